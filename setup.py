"""Packaging of maskdit_jax."""

from setuptools import find_packages, setup

TENSORFLOW = [
    # tensorflow_datasets prepares its data with it; training never imports it.
    "tensorflow-cpu; sys_platform == 'linux' and platform_machine == 'x86_64'",
    "tensorflow; sys_platform != 'linux' or platform_machine != 'x86_64'",
]
TORCH = ["torch==2.13.0"]
PLOTS = ["matplotlib>=3.10"]

setup(
    name="maskdit_jax",
    version="0.1.0",
    description="Training diffusion transformers on masked tokens, in JAX",
    license="Apache-2.0",
    python_requires=">=3.11",
    # The recipes stand at the top of the repository, and travel inside the package.
    packages=[*find_packages(include=["maskdit_jax", "maskdit_jax.*"]), "maskdit_jax.configs"],
    package_dir={"maskdit_jax.configs": "configs"},
    package_data={"maskdit_jax": ["py.typed"]},
    entry_points={
        "console_scripts": [
            "maskdit-train = maskdit_jax.main:main",
            "maskdit-sample = maskdit_jax.sample:main",
            "maskdit-doctor = maskdit_jax.doctor:main",
        ]
    },
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "tensorflow-datasets>=4.9.10",
        "ml-collections>=1.1",
        "clu>=0.0.12",
        "numpy>=2",
        "grain>=0.2.18",
        "scikit-learn>=1.5",
        "pillow>=11",
        "safetensors>=0.5",
        "importlib_resources",
        "lmdb>=1.6",
        "tqdm",
        "tensorboard>=2.20",
        *TENSORFLOW,
    ],
    extras_require={
        "test": [
            *(
                "pytest>=9",
                "ruff==0.17.5",
                "mypy==2.4.1",
                "setuptools>=70.1",
                "diffusers>=0.35",
                "nbclient>=0.10",
                "ipykernel>=6",
            ),
            *TORCH,
            *PLOTS,
        ],
        "plots": PLOTS,
        "torch": TORCH,
        "wandb": ["wandb>=0.20"],
        "cuda12": ["jax[cuda12]"],
        "cuda13": ["jax[cuda13]"],
    },
)
