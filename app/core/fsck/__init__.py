"""Do rows, storage and processes agree? One module for each group of invariants; `survey.py` runs them all.

Nothing here is needed while the service runs. Knows no printing and no command line.
"""
