"""
When to fork: the branching rules, by the names that `ARPOConfig.branch_rule` takes.

| name | class | paper |
|---|---|---|
| `bernoulli` | [`Bernoulli`] | ARPO, 2507.19849 |
| `threshold` | [`Threshold`] | ARPO, 2507.19849 |
| `random` | [`Chance`] | the control of AT²PO, 2601.04767 |
| `expansion` | [`Expansion`] | after AT²PO, 2601.04767 |
| `random_expansion` | [`RandomExpansion`] | Tree-GRPO, 2509.21240 |

A rule of one's own is a subclass of [`BranchRule`]: passed as an instance (`ARPOTrainer(branch_rule=...)`) or named as
`"my_module:MyRule"`.
"""
