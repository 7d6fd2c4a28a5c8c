/* A libcuda.so.1 whose device is ordinary memory and whose work is done at once, so that the real cuda-bindings can be
 * called without a GPU: it shows that every argument of BindingsApi converts and arrives. Built by
 * tests/engine/runtime/test_cuda_libcuda.py. Calls are written to the file named by FAKE_LIBCUDA_LOG. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int status;
typedef uint64_t pointer;
typedef void *handle;

static int capturing = 0, recorded = 0;
static uint64_t next_handle = 0x5000;

static void note(const char *name, uint64_t a, uint64_t b, uint64_t c) {
    const char *path = getenv("FAKE_LIBCUDA_LOG");
    FILE *file = path ? fopen(path, "a") : NULL;
    if (!file) return;
    fprintf(file, "%s %llu %llu %llu\n", name, (unsigned long long)a, (unsigned long long)b, (unsigned long long)c);
    fclose(file);
}

static handle new_handle(void) { return (handle)(next_handle += 16); }

status cuInit(unsigned flags) { return 0; }
status cuDriverGetVersion(int *version) { *version = 13050; return 0; }
status cuGetErrorString(status error, const char **text) { *text = error == 2 ? "out of memory" : "some error"; return 0; }
status cuDeviceGetCount(int *count) { *count = 2; return 0; }
status cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
status cuDeviceGetName(char *name, int length, int device) { snprintf(name, length, "Fake %d", device); return 0; }
status cuDeviceGetPCIBusId(char *name, int length, int device) { snprintf(name, length, "0000:A%d:00.0", device); return 0; }
status cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = 1 << 20; return 0; }
status cuDeviceGetUuid_v2(unsigned char *uuid, int device) { memset(uuid, 0xAB, 16); return 0; }
status cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
        case 75: *value = 8; break;  /* COMPUTE_CAPABILITY_MAJOR */
        case 76: *value = 9; break;  /* COMPUTE_CAPABILITY_MINOR */
        case 16: *value = 28; break; /* MULTIPROCESSOR_COUNT */
        case 19: *value = 1; break;  /* CAN_MAP_HOST_MEMORY */
        default: *value = 0;
    }
    return 0;
}
status cuDevicePrimaryCtxRetain(handle *context, int device) { *context = (handle)0xC0; note("retain", device, 0, 0); return 0; }
status cuDevicePrimaryCtxRelease_v2(int device) { note("release", device, 0, 0); return 0; }
status cuCtxPushCurrent_v2(handle context) { return context == (handle)0xC0 ? 0 : 201; }
status cuCtxPopCurrent_v2(handle *context) { *context = (handle)0xC0; return 0; }
status cuMemGetInfo_v2(size_t *free_, size_t *total) { *free_ = 12345; *total = 1 << 20; return 0; }
status cuMemAlloc_v2(pointer *address, size_t bytes) {
    if (bytes > 1 << 20) return 2;
    *address = (pointer)malloc(bytes);
    note("alloc", bytes, 0, 0);
    return 0;
}
status cuMemFree_v2(pointer address) { free((void *)address); note("free", 0, 0, 0); return 0; }
status cuMemHostAlloc(void **address, size_t bytes, unsigned flags) { *address = malloc(bytes); note("host_alloc", bytes, flags, 0); return 0; }
status cuMemHostGetDevicePointer_v2(pointer *device, void *host, unsigned flags) { *device = (pointer)host; return 0; }
status cuMemFreeHost(void *address) { free(address); note("host_free", 0, 0, 0); return 0; }
status cuMemHostRegister_v2(void *address, size_t bytes, unsigned flags) { note("register", (uint64_t)address, bytes, flags); return 0; }
status cuMemHostUnregister(void *address) { note("unregister", (uint64_t)address, 0, 0); return 0; }
status cuPointerGetAttribute(void *data, int attribute, pointer address) {
    if (address < 0x10000) return 1;
    if (attribute == 9) *(int *)data = 0;
    else if (attribute == 3) *(pointer *)data = address;
    else return 1;
    return 0;
}
status cuMemcpyAsync(pointer target, pointer source, size_t bytes, handle stream) {
    if (capturing) recorded++; else memcpy((void *)target, (void *)source, bytes);
    note("copy", bytes, (uint64_t)stream, 0);
    return 0;
}
status cuStreamCreate(handle *stream, unsigned flags) { *stream = new_handle(); note("stream", (uint64_t)*stream, flags, 0); return 0; }
status cuStreamSynchronize(handle stream) { note("synchronize", (uint64_t)stream, 0, 0); return 0; }
status cuStreamDestroy_v2(handle stream) { note("stream_destroy", (uint64_t)stream, 0, 0); return 0; }
status cuStreamWaitEvent(handle stream, handle event, unsigned flags) { note("wait", (uint64_t)stream, (uint64_t)event, flags); return 0; }
status cuStreamBeginCapture_v2(handle stream, int mode) { capturing = 1; recorded = 0; note("begin", (uint64_t)stream, mode, 0); return 0; }
status cuStreamEndCapture(handle stream, handle *graph) { capturing = 0; *graph = new_handle(); note("end", (uint64_t)stream, 0, 0); return 0; }
status cuEventCreate(handle *event, unsigned flags) { *event = new_handle(); note("event", (uint64_t)*event, flags, 0); return 0; }
status cuEventRecord(handle event, handle stream) { note("record", (uint64_t)event, (uint64_t)stream, 0); return 0; }
status cuEventSynchronize(handle event) { note("event_synchronize", (uint64_t)event, 0, 0); return 0; }
status cuEventElapsedTime_v2(float *ms, handle start, handle end) { *ms = 2.5f; note("elapsed", (uint64_t)start, (uint64_t)end, 0); return 0; }
status cuEventDestroy_v2(handle event) { note("event_destroy", (uint64_t)event, 0, 0); return 0; }
status cuGraphGetNodes(handle graph, handle *nodes, size_t *count) {
    if (nodes != NULL) for (size_t i = 0; i < *count; i++) nodes[i] = (handle)(i + 1);
    else *count = recorded;
    return 0;
}
status cuGraphNodeGetType(handle node, int *kind) { *kind = getenv("FAKE_LIBCUDA_HOST_NODE") && (uint64_t)node == 2 ? 3 : 1; return 0; }
status cuGraphMemcpyNodeGetParams(handle node, void *parameters) {
    memset(parameters, 0, 200);
    ((int *)parameters)[8] = getenv("FAKE_LIBCUDA_HOST_COPY") ? 1 : 2; /* srcMemoryType, behind four sizes */
    return 0;
}
status cuGraphInstantiateWithFlags(handle *executable, handle graph, unsigned long long flags) { *executable = new_handle(); note("instantiate", (uint64_t)graph, flags, 0); return 0; }
status cuGraphLaunch(handle executable, handle stream) { note("launch", (uint64_t)executable, (uint64_t)stream, 0); return 0; }
status cuGraphDestroy(handle graph) { note("graph_destroy", (uint64_t)graph, 0, 0); return 0; }
status cuGraphExecDestroy(handle executable) { note("executable_destroy", (uint64_t)executable, 0, 0); return 0; }

#define KNOWN(symbol, function) if (!strcmp(name, symbol)) { *found = (void *)function; return 0; }
#define PLAIN(function) KNOWN(#function, function)
status cuGetProcAddress_v2(const char *name, void **found, int version, uint64_t flags, int *result) {
    if (result) *result = 0;
    KNOWN("cuGetProcAddress", cuGetProcAddress_v2)
    PLAIN(cuInit) PLAIN(cuDriverGetVersion) PLAIN(cuGetErrorString) PLAIN(cuDeviceGetCount) PLAIN(cuDeviceGet)
    PLAIN(cuDeviceGetName) PLAIN(cuDeviceGetPCIBusId) PLAIN(cuDeviceGetAttribute) PLAIN(cuDevicePrimaryCtxRetain)
    KNOWN("cuDeviceTotalMem", cuDeviceTotalMem_v2) KNOWN("cuDeviceGetUuid", cuDeviceGetUuid_v2)
    KNOWN("cuDevicePrimaryCtxRelease", cuDevicePrimaryCtxRelease_v2)
    KNOWN("cuCtxPushCurrent", cuCtxPushCurrent_v2) KNOWN("cuCtxPopCurrent", cuCtxPopCurrent_v2)
    KNOWN("cuMemGetInfo", cuMemGetInfo_v2) KNOWN("cuMemAlloc", cuMemAlloc_v2) KNOWN("cuMemFree", cuMemFree_v2)
    PLAIN(cuMemHostAlloc) KNOWN("cuMemHostGetDevicePointer", cuMemHostGetDevicePointer_v2) PLAIN(cuMemFreeHost)
    KNOWN("cuMemHostRegister", cuMemHostRegister_v2) PLAIN(cuMemHostUnregister) PLAIN(cuPointerGetAttribute)
    PLAIN(cuMemcpyAsync) PLAIN(cuStreamCreate) PLAIN(cuStreamSynchronize) KNOWN("cuStreamDestroy", cuStreamDestroy_v2)
    PLAIN(cuStreamWaitEvent) KNOWN("cuStreamBeginCapture", cuStreamBeginCapture_v2) PLAIN(cuStreamEndCapture)
    PLAIN(cuEventCreate) PLAIN(cuEventRecord) PLAIN(cuEventSynchronize)
    KNOWN("cuEventElapsedTime", cuEventElapsedTime_v2) KNOWN("cuEventDestroy", cuEventDestroy_v2)
    PLAIN(cuGraphGetNodes) PLAIN(cuGraphNodeGetType) PLAIN(cuGraphMemcpyNodeGetParams) KNOWN("cuGraphInstantiate", cuGraphInstantiateWithFlags) PLAIN(cuGraphInstantiateWithFlags)
    PLAIN(cuGraphLaunch) PLAIN(cuGraphDestroy) PLAIN(cuGraphExecDestroy)
    *found = NULL;
    if (result) *result = 1; /* CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND */
    return 500;              /* CUDA_ERROR_NOT_FOUND */
}
