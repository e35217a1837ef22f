"""The one place that states the version; quick to import, and right in a checkout too."""

__version__ = "0.2.0"
