// The launch code of the CUDA kernels for the emulator.
#include "../cuda/run.cu"
