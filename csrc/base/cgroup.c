// cgroup.c - see cgroup.h. /proc/self/cgroup names the group of this process in each hierarchy, and
// /proc/self/mountinfo says which part of a hierarchy is mounted where: in a container often the container's
// own group and nothing above it.
#include "cgroup.h"

#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#define PATH_SIZE 4096

// A folder of a hierarchy that holds files of limits.
typedef struct group {
    char path[PATH_SIZE];
    bool v2;
} group;

typedef void (*group_fn)(const group * g, void * user);

// ------------------------------------------------------------------------------------------ files

static FILE * open_in(const char * folder, const char * name) {
    char path[PATH_SIZE + 64];
    const int size = snprintf(path, sizeof path, "%s/%s", folder, name);
    return size > 0 && (size_t) size < sizeof path ? fopen(path, "r") : NULL;
}

// The first one or two numbers of a file; "max" and what is negative are no limit. How many there were.
static int read_numbers(const group * g, const char * name, uint64_t out[2]) {
    FILE * file = open_in(g->path, name);
    if (!file) return 0;
    char words[2][32] = { "", "" };
    const int n = fscanf(file, "%31s %31s", words[0], words[1]);
    fclose(file);
    unsigned long long value = 0;
    int found = 0;
    for (; found < 2 && found < n; found++) {
        out[found] = UINT64_MAX;
        if (!strcmp(words[found], "max") || words[found][0] == '-') continue;
        if (sscanf(words[found], "%llu", &value) != 1) break;
        out[found] = value;
    }
    return found;
}

// ------------------------------------------------------------------------------------------ groups

// Whether a comma-separated list has a word.
static bool lists(const char * list, const char * word) {
    const size_t size = strlen(word);
    for (const char * at = list; at; at = strchr(at, ',')) {
        at += *at == ',';
        if (!strncmp(at, word, size) && (at[size] == ',' || at[size] == 0)) return true;
    }
    return false;
}

// A line of mountinfo, "36 25 0:32 /root /mount/point rw - cgroup2 source options", as the folder of the
// group at `path` where it is mounted, and how long the mount point is; 0 where it is not.
static size_t folder_of(char * line, const char * root, const char * path, const char * controller,
                        group * out) {
    char part[PATH_SIZE], point[PATH_SIZE], type[64], options[1024] = "";
    char * tail = strstr(line, " - ");
    if (!tail || sscanf(tail, " - %63s %*s %1023s", type, options) < 1) return 0;
    if (strcmp(type, out->v2 ? "cgroup2" : "cgroup") || (!out->v2 && !lists(options, controller))) return 0;
    if (sscanf(line, "%*s %*s %*s %4095s %4095s", part, point) != 2) return 0;
    const size_t used = strcmp(part, "/") ? strlen(part) : 0;
    const bool inside = !strncmp(path, part, used) && (path[used] == '/' || path[used] == 0);
    const char * rest = inside && !strstr(path + used, "/..") ? path + used : ""; // else it cannot be seen
    const int size = snprintf(out->path, sizeof out->path, "%s%s%s", root, point, rest);
    return size > 0 && (size_t) size < sizeof out->path ? strlen(root) + strlen(point) : 0;
}

// Calls fn for the group at `path` of a hierarchy and all groups that it lies in.
static void climb(const char * root, const char * path, const char * controller, bool v2, group_fn fn,
                  void * user) {
    char line[3 * PATH_SIZE];
    FILE * file = open_in(root, "proc/self/mountinfo");
    size_t top = 0;
    group g = { .v2 = v2 };
    while (file && !top && fgets(line, sizeof line, file)) top = folder_of(line, root, path, controller, &g);
    if (file) fclose(file);
    while (top) {
        fn(&g, user);
        char * slash = strrchr(g.path, '/');
        if (!slash || (size_t) (slash - g.path) < top) return;
        *slash = 0;
    }
}

// A line of /proc/self/cgroup is "0::/path" in version 2, "4:cpu,cpuacct:/path" in version 1.
static void climb_all(const char * root, const char * controller, group_fn fn, void * user) {
    char line[PATH_SIZE + 256];
    FILE * file = open_in(root, "proc/self/cgroup");
    while (file && fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = 0;
        char * names = strchr(line, ':');
        char * path = names ? strchr(names + 1, ':') : NULL;
        if (!path) continue;
        *path++ = 0;
        const bool v2 = !names[1];
        if (!strcmp(path, "/")) path = "";
        if (v2 || lists(names + 1, controller)) climb(root, path, controller, v2, fn, user);
    }
    if (file) fclose(file);
}

// ------------------------------------------------------------------------------------------ limits

static void limit_cpus(const group * g, void * n_) {
    int32_t * n = n_;
    uint64_t quota[2], period[2]; // microseconds
    const int n_read = read_numbers(g, g->v2 ? "cpu.max" : "cpu.cfs_quota_us", quota);
    if (g->v2) period[0] = quota[1];
    if (g->v2 ? n_read != 2 : !n_read || !read_numbers(g, "cpu.cfs_period_us", period)) return;
    if (quota[0] == UINT64_MAX || period[0] == 0) return;
    const uint64_t share = quota[0] / period[0];
    if (share < (uint64_t) *n) *n = share < 1 ? 1 : (int32_t) share;
}

int32_t cgroup_cpus(const char * root) {
    int32_t n = INT32_MAX;
    climb_all(root, "cpu", limit_cpus, &n);
    return n;
}

// Bytes of a group that are cached file pages, which give way.
static uint64_t cached(const group * g) {
    const char * const names[] = { g->v2 ? "active_file" : "total_active_file",
                                   g->v2 ? "inactive_file" : "total_inactive_file" };
    FILE * file = open_in(g->path, "memory.stat");
    char line[128], name[64];
    unsigned long long value;
    uint64_t sum = 0;
    while (file && fgets(line, sizeof line, file)) {
        if (sscanf(line, "%63s %llu", name, &value) != 2) continue;
        if (!strcmp(name, names[0]) || !strcmp(name, names[1])) sum += value;
    }
    if (file) fclose(file);
    return sum;
}

static void limit_memory(const group * g, void * n_) {
    uint64_t *n = n_, limit[2], used[2];
    if (!read_numbers(g, g->v2 ? "memory.max" : "memory.limit_in_bytes", limit) || limit[0] == UINT64_MAX)
        return;
    if (!read_numbers(g, g->v2 ? "memory.current" : "memory.usage_in_bytes", used)) return;
    const uint64_t gives_way = cached(g), taken = used[0] - (gives_way < used[0] ? gives_way : used[0]);
    const uint64_t available = taken < limit[0] ? limit[0] - taken : 0;
    if (available < *n) *n = available;
}

uint64_t cgroup_memory_available(const char * root) {
    uint64_t n = UINT64_MAX;
    climb_all(root, "memory", limit_memory, &n);
    return n;
}
