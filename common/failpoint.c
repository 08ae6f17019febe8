#include "common/failpoint.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "common/log.h"

#define PATH_BYTES 4096

bool moe_failpoints_on;
static char prefix[PATH_BYTES]; /* "DIR/ID." */

void moe_failpoints_open(const char *id) {
    const char *dir = getenv("MOESAIC_FAILPOINTS");
    int length = dir ? snprintf(prefix, sizeof prefix, "%s/%s.", dir, id) : -1;
    moe_failpoints_on = length > 0 && length < (int)sizeof prefix;
    if (moe_failpoints_on) moe_warn("failpoints are on (%s*): this process can be made to fail, for tests", prefix);
}

static void path_of(moe_failpoint_id id, char path[PATH_BYTES + 32]) {
    static const char *const names[] = {
#define X(id, name) name,
        MOE_FAILPOINTS(X)
#undef X
    };
    snprintf(path, PATH_BYTES + 32, "%s%s", prefix, names[id]);
}

void moe_failpoint_pass(moe_failpoint_id id) {
    char path[PATH_BYTES + 32];
    int pid = 0, number = 0;
    path_of(id, path);
    FILE *file = fopen(path, "re");
    if (!file) return;
    bool complete = fscanf(file, "%d %d\n", &pid, &number) == 2;
    fclose(file);
    if (unlink(path) != 0 || !complete || pid <= 1) return; /* another thread took it, or it makes no sense */
    moe_warn("failpoint %s: signal %d to process %d", path, number, pid);
    kill(pid, number);
}

bool moe_failpoint_is_held(moe_failpoint_id id) {
    char path[PATH_BYTES + 32];
    path_of(id, path);
    return access(path, F_OK) == 0;
}
