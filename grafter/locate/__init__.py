"""`grafter locate`: runs a pair left alone and grafted, and names the module that adds error. It reads in this order:

    runner       the pair, left alone and grafted; its floor too, where there is one
    measure      ledgers -> the worst difference of each point, in the baseline's order
    judgement    which differences are error: against the measured floor, or against the other points
    verdict      the outcome as data
    wording      the outcome in words
    table        the outcome to look at
    command      `grafter locate` itself

measure to wording are pure. Nothing is imported here: `grafter --help` should not wait for pydantic and rich.
"""
