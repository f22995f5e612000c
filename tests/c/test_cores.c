// test_cores.c - limits of control groups and cores of the machine, read from a tree of files that each case
// writes into a folder of its own.
#include "cgroup.h"
#include "cores.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static int n_wrong;

static void check(const char * what, int64_t found, int64_t need) {
    if (found == need) return;
    printf("cores: %s: found %lld, need %lld\n", what, (long long) found, (long long) need);
    n_wrong++;
}

// ------------------------------------------------------------------------------------------- trees

typedef struct entry {
    const char *path, *text;
} entry;

static void put(const char * root, const char * name, const char * text) {
    char path[1024];
    snprintf(path, sizeof path, "%s/%s", root, name);
    for (char * slash = strchr(path + strlen(root) + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        mkdir(path, 0700);
        *slash = '/';
    }
    FILE * file = fopen(path, "w");
    if (!file || fputs(text, file) < 0 || fclose(file)) n_wrong++;
}

static const char * tree(const entry * entries, int n) {
    static char root[64];
    strcpy(root, "/tmp/test-cores-XXXXXX");
    if (!mkdtemp(root)) exit(1);
    for (int i = 0; i < n; i++) put(root, entries[i].path, entries[i].text);
    return root;
}

static void drop(const char * root) {
    char command[128];
    snprintf(command, sizeof command, "rm -r '%s'", root);
    if (system(command)) n_wrong++;
}

#define TREE(...) tree((entry[]) { __VA_ARGS__ }, (int) (sizeof((entry[]) { __VA_ARGS__ }) / sizeof(entry)))

#define CGROUP(text) { "proc/self/cgroup", text }
#define MOUNTS(text) { "proc/self/mountinfo", text }
#define V2           "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
#define V1                                                                                                   \
    "30 23 0:27 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"                                                      \
    "32 30 0:29 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"                                      \
    "33 30 0:30 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"                            \
    "34 30 0:31 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"                                      \
    "35 30 0:32 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
#define GROUPS   "sys/fs/cgroup/"
#define GROUPS_1 "sys/fs/cgroup/cpu,cpuacct/"
#define NO_LIMIT INT32_MAX

static void cpus(const char * what, const char * root, int32_t need) {
    check(what, cgroup_cpus(root), need);
    drop(root);
}

// ---------------------------------------------------------------------------------------- version 2

static void test_v2(void) {
    cpus("nothing is known", TREE({ "proc/self/other", "" }), NO_LIMIT);
    cpus("no mounts", TREE(CGROUP("0::/a\n"), { GROUPS "a/cpu.max", "100000 100000" }), NO_LIMIT);
    cpus("no limit", TREE(CGROUP("0::/a\n"), MOUNTS(V2), { GROUPS "a/cpu.max", "max 100000\n" }), NO_LIMIT);
    cpus("in the root", TREE(CGROUP("0::/\n"), MOUNTS(V2), { GROUPS "cpu.max", "300000 100000\n" }), 3);
    cpus("nested", TREE(CGROUP("0::/a/b/c\n"), MOUNTS(V2), { GROUPS "a/b/c/cpu.max", "200000 100000\n" }), 2);
    cpus("above",
         TREE(CGROUP("0::/a/b/c\n"), MOUNTS(V2), { GROUPS "a/cpu.max", "400000 100000\n" },
              { GROUPS "a/b/cpu.max", "max 100000\n" }, { GROUPS "a/b/c/cpu.max", "900000 100000\n" }),
         4);
    cpus("beside",
         TREE(CGROUP("0::/a/b\n"), MOUNTS(V2), { GROUPS "a/c/cpu.max", "100000 100000\n" },
              { GROUPS "a/bb/cpu.max", "100000 100000\n" }),
         NO_LIMIT);
    cpus("half", TREE(CGROUP("0::/a\n"), MOUNTS(V2), { GROUPS "a/cpu.max", "50000 100000\n" }), 1);
    cpus("rounded", TREE(CGROUP("0::/a\n"), MOUNTS(V2), { GROUPS "a/cpu.max", "399999 100000\n" }), 3);
    cpus("period", TREE(CGROUP("0::/a\n"), MOUNTS(V2), { GROUPS "a/cpu.max", "20000 10000\n" }), 2);
    cpus("no period", TREE(CGROUP("0::/a\n"), MOUNTS(V2), { GROUPS "a/cpu.max", "20000 0\n" }), NO_LIMIT);
    cpus("one word", TREE(CGROUP("0::/a\n"), MOUNTS(V2), { GROUPS "a/cpu.max", "20000" }), NO_LIMIT);
    cpus("no number", TREE(CGROUP("0::/a\n"), MOUNTS(V2), { GROUPS "a/cpu.max", "x y" }), NO_LIMIT);
    cpus("empty", TREE(CGROUP("0::/a\n"), MOUNTS(V2), { GROUPS "a/cpu.max", "" }), NO_LIMIT);
    cpus("large", TREE(CGROUP("0::/a\n"), MOUNTS(V2), { GROUPS "a/cpu.max", "18446744073709551615 1" }),
         NO_LIMIT);
    cpus("a group of a container's host",
         TREE(CGROUP("0::/../b\n"), MOUNTS(V2), { GROUPS "cpu.max", "200000 100000\n" },
              { "sys/fs/b/cpu.max", "100000 100000" }),
         2);
    cpus("a part is mounted",
         TREE(CGROUP("0::/pod/box/in\n"),
              MOUNTS("31 23 0:28 /pod/box /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"),
              { GROUPS "cpu.max", "500000 100000\n" }, { GROUPS "in/cpu.max", "200000 100000\n" }),
         2);
}

// ---------------------------------------------------------------------------------------- version 1

static void test_v1(void) {
    const entry group =
        CGROUP("5:cpuset:/other\n4:cpu,cpuacct:/a/b\n3:memory:/m\n1:name=systemd:/s\n0::/u\n");
    const entry mounts = MOUNTS(V1), period = { GROUPS_1 "a/b/cpu.cfs_period_us", "100000\n" };
    cpus("no quota", TREE(group, mounts, period, { GROUPS_1 "a/b/cpu.cfs_quota_us", "-1\n" }), NO_LIMIT);
    cpus("a quota", TREE(group, mounts, period, { GROUPS_1 "a/b/cpu.cfs_quota_us", "250000\n" }), 2);
    cpus("a small quota", TREE(group, mounts, period, { GROUPS_1 "a/b/cpu.cfs_quota_us", "50000\n" }), 1);
    cpus("no period", TREE(group, mounts, { GROUPS_1 "a/b/cpu.cfs_quota_us", "50000\n" }), NO_LIMIT);
    cpus("above",
         TREE(group, mounts, period, { GROUPS_1 "a/b/cpu.cfs_quota_us", "-1\n" },
              { GROUPS_1 "a/cpu.cfs_quota_us", "30000\n" }, { GROUPS_1 "a/cpu.cfs_period_us", "10000\n" }),
         3);
    cpus("another controller's",
         TREE(group, mounts, { "sys/fs/cgroup/cpuset/other/cpu.cfs_quota_us", "100000" },
              { "sys/fs/cgroup/cpuset/other/cpu.cfs_period_us", "100000" }),
         NO_LIMIT);
    cpus("beside version 2",
         TREE(group, mounts, period, { GROUPS_1 "a/b/cpu.cfs_quota_us", "900000\n" },
              { "sys/fs/cgroup/unified/u/cpu.max", "300000 100000\n" }),
         3);
    cpus("in a container of Docker",
         TREE(CGROUP("4:cpuacct,cpu:/docker/abc\n"),
              MOUNTS("33 30 0:30 /docker/abc /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct\n"),
              { GROUPS_1 "cpu.cfs_quota_us", "150000\n" }, { GROUPS_1 "cpu.cfs_period_us", "50000\n" }),
         3);
    cpus("a group that cannot be seen",
         TREE(CGROUP("4:cpu:/docker/abc\n"),
              MOUNTS("33 30 0:30 /docker/ab /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu\n"),
              { GROUPS_1 "cpu.cfs_quota_us", "200000\n" }, { GROUPS_1 "cpu.cfs_period_us", "100000\n" },
              { GROUPS_1 "c/cpu.cfs_quota_us", "100000\n" }, { GROUPS_1 "c/cpu.cfs_period_us", "100000\n" }),
         2);
}

// ------------------------------------------------------------------------------------------ memory

static void memory(const char * what, const char * root, uint64_t need) {
    check(what, (int64_t) cgroup_memory_available(root), (int64_t) need);
    drop(root);
}

static void test_memory(void) {
    memory("no memory limit", TREE(CGROUP("0::/a\n"), MOUNTS(V2), { GROUPS "a/memory.max", "max\n" }),
           UINT64_MAX);
    memory(
        "nested memory",
        TREE(CGROUP("0::/a/b\n"), MOUNTS(V2), { GROUPS "a/memory.max", "1000\n" },
             { GROUPS "a/memory.current", "700\n" },
             { GROUPS "a/memory.stat", "anon 5\nactive_file 100\ninactive_file 50\ntotal_active_file 9\n" },
             { GROUPS "a/b/memory.max", "900\n" }, { GROUPS "a/b/memory.current", "300\n" }),
        450);
    memory("memory of version 1",
           TREE(CGROUP("3:memory:/m\n0::/\n"), MOUNTS(V1),
                { "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n" },
                { "sys/fs/cgroup/memory/memory.usage_in_bytes", "0\n" },
                { "sys/fs/cgroup/memory/m/memory.limit_in_bytes", "5000\n" },
                { "sys/fs/cgroup/memory/m/memory.usage_in_bytes", "4000\n" },
                { "sys/fs/cgroup/memory/m/memory.stat", "active_file 9\ntotal_active_file 500\n" }),
           1500);
    memory("more than there is",
           TREE(CGROUP("0::/\n"), MOUNTS(V2), { GROUPS "memory.max", "10\n" },
                { GROUPS "memory.current", "11\n" }),
           0);
}

// ------------------------------------------------------------------------------------------- cores

#define TOPOLOGY(cpu, name) "sys/devices/system/cpu/cpu" cpu "/topology/" name

// Four cores of two threads, numbered as `first` and `second` say, of which `allowed` may be used.
static void among(const char * what, const char * root, const char * allowed, int32_t need) {
    bool set[64] = { false };
    for (const char * c = allowed; *c; c++) set[*c - '0'] = true;
    check(what, cores_among(root, set, 64), need);
}

static void test_cores(void) {
    const char * root = TREE({ TOPOLOGY("0", "thread_siblings_list"), "0,4\n" },
                             { TOPOLOGY("1", "thread_siblings_list"), "1,5\n" },
                             { TOPOLOGY("4", "thread_siblings_list"), "0,4\n" },
                             { TOPOLOGY("5", "thread_siblings_list"), "1,5\n" });
    among("all of them", root, "0145", 2);
    among("both of one", root, "04", 1);
    among("second threads only", root, "45", 2);
    among("one of each, and both", root, "145", 2);
    among("none", root, "", 0);
    among("unknown ones", root, "0489", 3);
    drop(root);
    root = TREE({ TOPOLOGY("2", "core_cpus_list"), "2-3\n" }, { TOPOLOGY("3", "core_cpus_list"), "2-3\n" },
                { TOPOLOGY("6", "core_cpus_list"), "\n" }, { TOPOLOGY("7", "core_cpus_list"), "99\n" });
    among("neighbours", root, "23", 1);
    among("the second neighbour", root, "3", 1);
    among("nonsense", root, "67", 2);
    drop(root);
}

int main(void) {
    test_v2();
    test_v1();
    test_memory();
    test_cores();
    printf("cores: %d failed\n", n_wrong);
    return n_wrong != 0;
}
