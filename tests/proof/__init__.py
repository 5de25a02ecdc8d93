"""What is proven about the kernels without a GPU: ``python -m tests.proof`` writes docs/proof.md."""
