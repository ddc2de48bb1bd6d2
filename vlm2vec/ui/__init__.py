"""`vlm2vec ui`: a page in the browser to search an index with words or a picture.

    search    what is asked and what is found; knows nothing of HTTP
    pictures  small copies of an item's pictures, and the files themselves
    page      both as HTML
    guard     who may ask at all, and the headers of every answer
    app       the routes

The page works without its script: a form that is sent, a page that comes back. The script sends the same form and puts the results where
they belong.
"""
