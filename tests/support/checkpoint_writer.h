/* Writes small safetensors files, right and wrong ones. Fails the test (CMocka) when the system refuses. */
#pragma once
#include "common/model/safetensors.h"
#include "tests/support/temp_dir.h"

/* A file with that header text and `data_bytes` of zeroes behind it. */
void moe_test_write_header(const moe_test_dir *dir, const char *file, const char *header, size_t data_bytes);

/* A correct file of these tensors (name, dtype, dims and data are read), in their order. */
void moe_test_write_tensors(const moe_test_dir *dir, const char *file, const moe_safetensor *tensors, int64_t count);
