"""`libdlo_plugins.so`: the plugins in C++ with their kernels embedded."""
