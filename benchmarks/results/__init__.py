"""How well each strategy learns: tables of rows, each made by one command and kept as one file.

    python -m benchmarks.results --omniglot omniglot28.npz --groceries FOLDER [--only TABLE/NAME]
    python -m benchmarks.results --page

A row that is there is skipped; one that was broken off goes on. The page is drawn from the files.
"""
