"""The paper (Lyu et al. 2024, arXiv 2402.18540) as data, as recipes of grids, and beside the results of grids."""
