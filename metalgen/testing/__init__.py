"""Conformance suites: a new device is tested by inheriting one.

These modules need pytest, which metalgen itself does not depend on.
"""
