/* `moesaic-worker`: `moesaic worker` as a program of its own, for containers and units. */
#include "cli/commands.h"

int main(int argc, char **argv) {
    argv[0] = "worker";
    return moe_run_command(argc, argv);
}
