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
 *   NVML_STUB_FAIL=function:3 this function returns that error; several with commas between
 *   NVML_STUB_ONES=function   this function sets every bit of its answer; several with commas between
 *   NVML_STUB_SAME=1          all GPUs tell the same UUID
 *   NVML_STUB_ONLY=1          FAIL and ONES are for this GPU alone, and its MIG instances
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

/* What is set for a function in a list such as `one:3,two:4`, without a colon 1; 0 if it is not there. */
static int listed(const char *name, const char *function, const struct device *device) {
    const char *only = setting("NVML_STUB_ONLY");
    if (*only && (!device || device->gpu != (unsigned)atoi(only))) return 0;
    size_t length = strlen(function);
    for (const char *item = setting(name); *item; item += strcspn(item, ","), item += *item == ',') {
        if (strncmp(item, function, length)) continue;
        if (item[length] == ':') return atoi(item + length + 1);
        if (!item[length] || item[length] == ',') return 1;
    }
    return 0;
}

/* What happens in every function before it does its work. */
static int enter(const char *function, const struct device *device) {
    if (!strcmp(setting("NVML_STUB_HANG"), function)) for (;;) pause();
    if (!strcmp(setting("NVML_STUB_CRASH"), function)) abort();
    return listed("NVML_STUB_FAIL", function, device);
}
#define ENTER do { int code = enter(__func__, NULL); if (code) return code; } while (0)
#define ANSWER(device, answer, size) do { \
        int code = enter(__func__, device); \
        if (code) return code; \
        if (listed("NVML_STUB_ONES", __func__, device)) { memset(answer, 0xff, size); return OK; } \
    } while (0)

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    ENTER;
    if (*setting("NVML_STUB_NOISE")) { printf("{\"gpus\": \"noise\"}\n"); fflush(stdout); }
    return OK;
}

int nvmlShutdown(void) { return OK; }

const char *nvmlErrorString(int code) { (void)code; return "an error of the stub"; }

int nvmlSystemGetDriverVersion(char *text, unsigned size) {
    ANSWER(NULL, text, size);
    snprintf(text, size, "545.23.06");
    return OK;
}

int nvmlSystemGetCudaDriverVersion_v2(int *version) { ANSWER(NULL, version, sizeof *version); *version = 12030; return OK; }

int nvmlDeviceGetCount_v2(unsigned *count) { ANSWER(NULL, count, sizeof *count); *count = atoi(setting("NVML_STUB_GPUS")); return OK; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, struct device **device) {
    ENTER;
    if (index >= (unsigned)atoi(setting("NVML_STUB_GPUS")) || index >= MAX_GPUS) return INVALID;
    const char *lost = setting("NVML_STUB_LOST");
    if (*lost && index == (unsigned)atoi(lost)) return LOST;
    gpus[index] = (struct device){index, -1};
    *device = &gpus[index];
    return listed("NVML_STUB_FAIL", __func__, *device);
}

int nvmlDeviceGetName(struct device *device, char *text, unsigned size) {
    ANSWER(device, text, size);
    if (device->mig >= 0) { snprintf(text, size, "NVIDIA Stub MIG 1g.10gb"); return OK; }
    const char *name = setting("NVML_STUB_NAMES");
    for (unsigned skip = device->gpu; skip && strchr(name, '|'); skip--) name = strchr(name, '|') + 1;
    snprintf(text, size, "%.*s", (int)strcspn(name, "|"), name);
    if (!*text) snprintf(text, size, "NVIDIA Stub");
    return OK;
}

int nvmlDeviceGetUUID(struct device *device, char *text, unsigned size) {
    ANSWER(device, text, size);
    int mig = device->mig + 1, gpu = *setting("NVML_STUB_SAME") ? 0 : device->gpu;
    snprintf(text, size, "%s-%08x-0000-0000-0000-%012x", mig ? "MIG" : "GPU", gpu, mig);
    return OK;
}

int nvmlDeviceGetMemoryInfo(struct device *device, struct memory *memory) {
    ANSWER(device, memory, sizeof *memory);
    unsigned long long mib = device->mig < 0 ? 16384 : 2048, used = 512 + device->gpu;
    *memory = (struct memory){mib << 20, (mib - used) << 20, used << 20};
    return OK;
}

int nvmlDeviceGetMinorNumber(struct device *device, unsigned *minor) {
    ANSWER(device, minor, sizeof *minor);
    *minor = device->gpu;
    return OK;
}

int nvmlDeviceGetGpuInstanceId(struct device *device, unsigned *id) {
    ANSWER(device, id, sizeof *id);
    *id = device->mig + 1;
    return OK;
}

int nvmlDeviceGetComputeInstanceId(struct device *device, unsigned *id) {
    ANSWER(device, id, sizeof *id);
    *id = 0;
    return OK;
}

int nvmlDeviceGetPciInfo_v3(struct device *device, struct pci *pci) {
    ANSWER(device, pci, sizeof *pci);
    *pci = (struct pci){.domain = 0, .bus = 0x40 + device->gpu, .device = 0};
    return OK;
}

int nvmlDeviceGetCudaComputeCapability(struct device *device, int *major, int *minor) {
    ANSWER(device, major, sizeof *major);
    *major = 8;
    *minor = 9;
    return OK;
}

int nvmlDeviceGetUtilizationRates(struct device *device, struct utilization *rates) {
    ANSWER(device, rates, sizeof *rates);
    if (device->gpu == 0 && *setting("NVML_STUB_MIG")) return NOT_SUPPORTED;
    *rates = (struct utilization){50 + device->gpu, 20};
    return OK;
}

int nvmlDeviceGetTemperature(struct device *device, unsigned sensor, unsigned *celsius) {
    (void)sensor;
    ANSWER(device, celsius, sizeof *celsius);
    *celsius = 60 + device->gpu;
    return OK;
}

int nvmlDeviceGetPowerUsage(struct device *device, unsigned *milliwatts) {
    ANSWER(device, milliwatts, sizeof *milliwatts);
    *milliwatts = 250500 + device->gpu;
    return OK;
}

int nvmlDeviceGetMigMode(struct device *device, unsigned *current, unsigned *pending) {
    ANSWER(device, current, sizeof *current);
    if (!*setting("NVML_STUB_MIG")) return NOT_SUPPORTED;
    *current = *pending = device->gpu == 0;
    return OK;
}

int nvmlDeviceGetMaxMigDeviceCount(struct device *device, unsigned *count) {
    ANSWER(device, count, sizeof *count);
    *count = MIG_PLACES;
    return OK;
}

int nvmlDeviceGetMigDeviceHandleByIndex(struct device *device, unsigned place, struct device **part) {
    ENTER;
    unsigned number = place / 2;
    if (place % 2 == 0 || number >= (unsigned)atoi(setting("NVML_STUB_MIG")) || number >= MAX_MIG) return NOT_FOUND;
    parts[number] = (struct device){device->gpu, (int)number};
    *part = &parts[number];
    return listed("NVML_STUB_FAIL", __func__, device);
}
