"""Several processes that train as one: who this process is (ranks.py), and how a step's rows are dealt (dealing.py)."""
