"""`grafter locate`: runs a pair left alone and grafted, and names the module that adds error. In the order of the data:

    tools/locate_runner.py  runs the pair, left alone and grafted; its floor as well, if there is one
    measure                 ledgers -> the worst difference of each point, in the baseline's order
    added_error             which differences are error: against the measured floor, or against the other points
    verdict                 the result as data and in words

The command and its table are in grafter.cli. The modules here are pure. Nothing is imported here, because
`grafter --help` should not wait for pydantic and rich.
"""
