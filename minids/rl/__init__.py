"""R1: reinforcement learning from rewards that a program can check [R1 section 2]."""
