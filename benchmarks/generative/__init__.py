"""The generative baseline: AutoVER's inference (Xiao et al., ECCV 2024), for comparison only."""
