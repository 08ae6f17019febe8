#include "cli/cores.h"

#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bool usable_cores(cpu_set_t *set) {
    CPU_ZERO(set);
    return sched_getaffinity(0, sizeof *set, set) == 0;
}

int32_t moe_cores_count(void) {
    cpu_set_t set;
    return usable_cores(&set) && CPU_COUNT(&set) > 0 ? CPU_COUNT(&set) : 1;
}

/* One number below CPU_SETSIZE; *text moves behind it. */
static bool take_core(const char **text, long *core) {
    char *end;
    if (**text < '0' || **text > '9') return false;
    *core = strtol(*text, &end, 10);
    *text = end;
    return *core < CPU_SETSIZE;
}

static bool parse(const char *list, cpu_set_t *set) {
    CPU_ZERO(set);
    for (;;) {
        long first, last;
        if (!take_core(&list, &first)) return false;
        last = first;
        if (*list == '-') {
            list++;
            if (!take_core(&list, &last) || last < first) return false;
        }
        for (long core = first; core <= last; core++) CPU_SET((size_t)core, set);
        if (*list == '\0') return true;
        if (*list++ != ',') return false;
    }
}

moe_status moe_cores_restrict(const char *list, moe_error *err) {
    cpu_set_t set;
    if (!parse(list, &set)) return moe_fail(err, MOE_INVALID_ARGUMENT, "'%.64s' is not a list of cores such as 0-3,8", list);
    if (sched_setaffinity(0, sizeof set, &set) == 0) return MOE_OK;
    return moe_fail(err, MOE_INVALID_ARGUMENT, "cores %.64s: %s", list, strerror(errno));
}

bool moe_cores_share(int32_t index, int32_t count, char list[MOE_CORES_TEXT_BYTES]) {
    cpu_set_t set;
    list[0] = '\0';
    if (!usable_cores(&set) || CPU_COUNT(&set) < count) return false;
    int64_t cores = CPU_COUNT(&set), from = index * cores / count, to = (index + 1) * cores / count, nth = 0;
    size_t used = 0;
    for (size_t core = 0; core < CPU_SETSIZE; core++) {
        if (!CPU_ISSET(core, &set)) continue;
        if (nth >= from && nth < to) {
            int length = snprintf(list + used, MOE_CORES_TEXT_BYTES - used, "%s%zu", used ? "," : "", core);
            used += (size_t)length;
        }
        nth++;
        if (used < MOE_CORES_TEXT_BYTES) continue;
        list[0] = '\0';
        return false;
    }
    return true;
}
