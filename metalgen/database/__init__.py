"""The tuning database: every measurement that was taken, and the look-up of what won.

`lookup` and `records` need the standard library only; `store` needs sqlite-utils.
"""
