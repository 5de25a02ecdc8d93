// The CUDA library: no kernel yet, only the record of what it was built for.

extern "C" __attribute__((visibility("default"))) const char* fusedrnn_cuda_built_for() {
  return FUSEDRNN_CUDA_ARCHITECTURES;
}
