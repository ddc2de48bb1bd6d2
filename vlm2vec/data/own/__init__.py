"""One's own pairs, in the schema of `docs/own_data.md`: a JSONL or parquet file that trains and evaluates.

`schema` says what a row may hold and brings it into one form, `records` reads raw rows, `read` makes pairs and evaluation sets of them,
`validate` finds everything wrong with a file and counts it, `split` holds a part out, `folder` writes the pairs of a folder of pictures.
"""
