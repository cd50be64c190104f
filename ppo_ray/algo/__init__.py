"""The mathematics of PPO: pure torch functions of tensors.

No configuration object, no Ray, no files. Dimensions: B batch, R response tokens. Every masked function takes `mask`,
`[B, R]` bool, True on sampled tokens; what lies outside it, NaN included, never changes a result.
"""
