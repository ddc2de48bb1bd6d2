"""One module per meta-task: functions from the sources and a row of the table to training rows and questions."""
