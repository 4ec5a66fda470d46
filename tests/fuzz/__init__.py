"""Differential fuzzing of `cxrkit.attribute`: random networks whose right maps are known from slow formulas.

A network is a list of steps (`steps`), drawn from a seed (`drawing`), that exists twice: spelled out in torch in one of
the many ways in which people write networks (`spelling`, `building`), and read slowly in float64 (`algebra`,
`relevance`). `oracles` turns that reading into the right map of every method, `state` holds what a call must leave
alone, `policy` says what may be refused, `trial` compares, `__main__` counts.
"""
