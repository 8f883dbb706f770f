/* A libnvidia-ml.so.1 that plays the GPUs it is told to, and their faults.
 *
 * It is told by the environment, or by a file `nvml_stub.conf` beside it (NAME=VALUE lines), because the process
 * that loads it is given hardly any environment:
 *   NVML_STUB_GPUS=2          how many GPUs
 *   NVML_STUB_NAMES=A|B       their names; the last one goes on for the rest
 *   NVML_STUB_MIG=2           how many MIG instances GPU 0 is cut into (with a gap between their places)
 *   NVML_STUB_LOST=1          this GPU has fallen off the bus
 *   NVML_STUB_HANG=function   this function never returns
 *   NVML_STUB_CRASH=function  this function takes the process down
 *   NVML_STUB_FAIL=function:3 this function returns that error
 *   NVML_STUB_NOISE=1         print to stdout at the start
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { OK = 0, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, LOST = 15 };
enum { MAX_GPUS = 64, MAX_MIG = 7, MIG_PLACES = 2 * MAX_MIG };

struct device { unsigned gpu; int mig; };
struct memory { unsigned long long total, free, used; };
struct utilization { unsigned gpu, memory; };
struct pci { char legacy_id[16]; unsigned domain, bus, device, id, subsystem; char id_text[32]; };

static struct device gpus[MAX_GPUS], parts[MAX_MIG];

static const char *setting(const char *name) { const char *value = getenv(name); return value ? value : ""; }

__attribute__((constructor)) static void read_settings(void) {
    Dl_info self;
    char path[4096], line[1024];
    if (!dladdr((void *)read_settings, &self)) return;
    snprintf(line, sizeof line, "%s", self.dli_fname);
    snprintf(path, sizeof path, "%s/nvml_stub.conf", dirname(line));
    FILE *file = fopen(path, "r");
    if (!file) return;
    while (fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = 0;
        char *value = strchr(line, '=');
        if (value) { *value++ = 0; setenv(line, value, 0); }
    }
    fclose(file);
}

/* What happens in every function before it does its work. */
static int enter(const char *function) {
    if (!strcmp(setting("NVML_STUB_HANG"), function)) for (;;) pause();
    if (!strcmp(setting("NVML_STUB_CRASH"), function)) abort();
    const char *fail = setting("NVML_STUB_FAIL");
    size_t length = strlen(function);
    return !strncmp(fail, function, length) && fail[length] == ':' ? atoi(fail + length + 1) : OK;
}
#define ENTER do { int code = enter(__func__); if (code) return code; } while (0)

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    ENTER;
    if (*setting("NVML_STUB_NOISE")) { printf("{\"gpus\": \"noise\"}\n"); fflush(stdout); }
    return OK;
}

int nvmlShutdown(void) { return OK; }

const char *nvmlErrorString(int code) { (void)code; return "an error of the stub"; }

int nvmlSystemGetDriverVersion(char *text, unsigned size) {
    ENTER;
    snprintf(text, size, "545.23.06");
    return OK;
}

int nvmlSystemGetCudaDriverVersion_v2(int *version) { ENTER; *version = 12030; return OK; }

int nvmlDeviceGetCount_v2(unsigned *count) { ENTER; *count = atoi(setting("NVML_STUB_GPUS")); return OK; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, struct device **device) {
    ENTER;
    if (index >= (unsigned)atoi(setting("NVML_STUB_GPUS")) || index >= MAX_GPUS) return INVALID;
    const char *lost = setting("NVML_STUB_LOST");
    if (*lost && index == (unsigned)atoi(lost)) return LOST;
    gpus[index] = (struct device){index, -1};
    *device = &gpus[index];
    return OK;
}

int nvmlDeviceGetName(struct device *device, char *text, unsigned size) {
    ENTER;
    if (device->mig >= 0) { snprintf(text, size, "NVIDIA Stub MIG 1g.10gb"); return OK; }
    const char *name = setting("NVML_STUB_NAMES");
    for (unsigned skip = device->gpu; skip && strchr(name, '|'); skip--) name = strchr(name, '|') + 1;
    snprintf(text, size, "%.*s", (int)strcspn(name, "|"), name);
    if (!*text) snprintf(text, size, "NVIDIA Stub");
    return OK;
}

int nvmlDeviceGetUUID(struct device *device, char *text, unsigned size) {
    ENTER;
    int mig = device->mig + 1;
    snprintf(text, size, "%s-%08x-0000-0000-0000-%012x", mig ? "MIG" : "GPU", device->gpu, mig);
    return OK;
}

int nvmlDeviceGetMemoryInfo(struct device *device, struct memory *memory) {
    ENTER;
    unsigned long long mib = device->mig < 0 ? 16384 : 2048, used = 512 + device->gpu;
    *memory = (struct memory){mib << 20, (mib - used) << 20, used << 20};
    return OK;
}

int nvmlDeviceGetMinorNumber(struct device *device, unsigned *minor) {
    ENTER;
    *minor = device->gpu;
    return OK;
}

int nvmlDeviceGetGpuInstanceId(struct device *device, unsigned *id) {
    ENTER;
    *id = device->mig + 1;
    return OK;
}

int nvmlDeviceGetComputeInstanceId(struct device *device, unsigned *id) {
    (void)device;
    ENTER;
    *id = 0;
    return OK;
}

int nvmlDeviceGetPciInfo_v3(struct device *device, struct pci *pci) {
    ENTER;
    *pci = (struct pci){.domain = 0, .bus = 0x40 + device->gpu, .device = 0};
    return OK;
}

int nvmlDeviceGetCudaComputeCapability(struct device *device, int *major, int *minor) {
    (void)device;
    ENTER;
    *major = 8;
    *minor = 9;
    return OK;
}

int nvmlDeviceGetUtilizationRates(struct device *device, struct utilization *rates) {
    ENTER;
    if (device->gpu == 0 && *setting("NVML_STUB_MIG")) return NOT_SUPPORTED;
    *rates = (struct utilization){50 + device->gpu, 20};
    return OK;
}

int nvmlDeviceGetTemperature(struct device *device, unsigned sensor, unsigned *celsius) {
    (void)sensor;
    ENTER;
    *celsius = 60 + device->gpu;
    return OK;
}

int nvmlDeviceGetPowerUsage(struct device *device, unsigned *milliwatts) {
    ENTER;
    *milliwatts = 250500 + device->gpu;
    return OK;
}

int nvmlDeviceGetMigMode(struct device *device, unsigned *current, unsigned *pending) {
    ENTER;
    if (!*setting("NVML_STUB_MIG")) return NOT_SUPPORTED;
    *current = *pending = device->gpu == 0;
    return OK;
}

int nvmlDeviceGetMaxMigDeviceCount(struct device *device, unsigned *count) {
    (void)device;
    ENTER;
    *count = MIG_PLACES;
    return OK;
}

int nvmlDeviceGetMigDeviceHandleByIndex(struct device *device, unsigned place, struct device **part) {
    ENTER;
    unsigned number = place / 2;
    if (place % 2 == 0 || number >= (unsigned)atoi(setting("NVML_STUB_MIG")) || number >= MAX_MIG) return NOT_FOUND;
    parts[number] = (struct device){device->gpu, (int)number};
    *part = &parts[number];
    return OK;
}
