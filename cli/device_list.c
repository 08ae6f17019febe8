#include "cli/device_list.h"

#include <stdlib.h>

static bool listed(const moe_device_list *list, long id) {
    for (int32_t i = 0; i < list->count; i++)
        if (list->ids[i] == id) return true;
    return false;
}

moe_status moe_device_list_parse(const char *text, moe_device_list *out, moe_error *err) {
    *out = (moe_device_list){.count = 0};
    for (const char *p = text;; p++) {
        char *end;
        long id = strtol(p, &end, 10);
        bool number = *p >= '0' && *p <= '9' && id < MOE_MAX_DEVICES;
        if (!number || listed(out, id) || (*end && *end != ','))
            return moe_fail(err, MOE_INVALID_ARGUMENT,
                            "--devices: '%s' is not a list of different numbers from 0 to %d, such as 0,1", text,
                            MOE_MAX_DEVICES - 1);
        out->ids[out->count++] = (int32_t)id;
        p = end;
        if (!*p) return MOE_OK;
    }
}
