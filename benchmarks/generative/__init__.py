"""The generative baseline: the inference of AutoVER (Xiao et al., ECCV 2024), for comparison only."""
