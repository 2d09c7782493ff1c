"""Benchmarks: `python -m bench run|compare|report|memory`, rows in results/<machine>.csv, as README.md explains."""
