"""`python -m grpo_lab`, which is what launchers of several processes want: `torchrun --nproc_per_node 2 -m grpo_lab ...`."""

from grpo_lab.cli import main

if __name__ == "__main__":
    main()
