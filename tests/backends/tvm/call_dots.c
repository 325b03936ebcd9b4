// Calls the kernel `dots` of test_vector.py without a TVM runtime, so that an emulator can run it.
//
// Standard input holds, for each call, the codes, one word of activations and the starts; the results go to standard
// output. The structures are those of DLPack (DLTensor) and of TVM FFI's C interface (TVMFFIAny).

#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define ALIGNED __attribute__((aligned(64)))

typedef struct {
  void *data;
  int32_t device_type, device_id, ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
} Tensor;

typedef struct {
  int32_t type, padding;
  union {
    int64_t number;
    void *pointer;
  } value;
} Any;

enum { ANY_INT = 1, ANY_TENSOR = 7, DEVICE_CPU = 1, CODE_INT = 0, CODE_UINT = 1 };

int32_t __tvm_ffi_dots(void *self, const Any *args, int32_t count, Any *result);

// What a refused argument calls.
void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int i = 0; i < count; i++) fputs(parts[i], stderr);
}

// Small local buffers come from here where LLVM does not keep them in registers.
static uint8_t workspace[1 << 12] ALIGNED;
void *TVMBackendAllocWorkspace(int type, int id, uint64_t size, int code, int bits) {
  return size <= sizeof workspace ? workspace : 0;
}
int TVMBackendFreeWorkspace(int type, int id, void *pointer) { return 0; }

static uint8_t codes[LANES * 4] ALIGNED;
static int32_t word[1] ALIGNED, start[LANES] ALIGNED, out[LANES] ALIGNED;

int main(void) {
  int64_t shapes[4] = {LANES * 4, 1, LANES, LANES}, stride = 1;
  void *data[4] = {codes, word, start, out};
  Tensor tensors[4];
  Any args[5], result;
  memset(args, 0, sizeof args);
  for (int i = 0; i < 4; i++) {
    Tensor tensor = {data[i], DEVICE_CPU, 0, 1, i ? CODE_INT : CODE_UINT, i ? 32 : 8, 1, &shapes[i], &stride, 0};
    tensors[i] = tensor;
    args[i].type = ANY_TENSOR;
    args[i].value.pointer = &tensors[i];
  }
  args[4].type = ANY_INT;
  args[4].value.number = 1;
  while (fread(codes, 1, sizeof codes, stdin) == sizeof codes) {
    if (fread(word, 4, 1, stdin) != 1 || fread(start, 4, LANES, stdin) != LANES) return 2;
    memset(&result, 0, sizeof result);
    if (__tvm_ffi_dots(0, args, 5, &result)) return 3;
    fwrite(out, 4, LANES, stdout);
  }
  return 0;
}
