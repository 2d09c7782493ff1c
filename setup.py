"""Build ttaq."""

from setuptools import setup

setup(
    packages=["ttaq", "ttaq.adaptation", "ttaq.streams", "ttaq.kernels"],
    package_dir={"ttaq": "ttaq", "ttaq.kernels": "kernels"},
    package_data={"ttaq": ["py.typed"]},
)
