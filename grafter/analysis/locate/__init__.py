"""`grafter locate`: runs a pair left alone and grafted, and names the module that adds error. Read it in this order:

    runner       runs the pair, left alone and grafted; its floor as well, if there is one
    measure      ledgers -> the worst difference of each point, in the baseline's order
    judgement    which differences are error: against the measured floor, or against the other points
    verdict      the result as data
    wording      the result in words
    table        the result as a printed table
    command      `grafter locate` itself

The modules from measure to wording are pure. Nothing is imported here, because `grafter --help` should not wait for
pydantic and rich.
"""
