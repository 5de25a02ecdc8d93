"""What is proven about the CUDA kernels without a GPU: ``python -m tests.proof`` writes docs/proof.md."""
