"""The bench for rewards: one reward against written cases (cases.py), a recipe's whole reward against golds and junk on its
own data (recipes.py), another reward on a run's stored answers (rescore.py), and a first file to start from (starter.py)."""
