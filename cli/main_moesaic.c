/* The `moesaic` command. */
#include "cli/commands.h"

int main(int argc, char **argv) { return moe_run_command(argc - 1, argv + 1); }
