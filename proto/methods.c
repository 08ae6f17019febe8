#include "proto/methods.h"

#include <string.h>

const ProtobufCServiceDescriptor *const moe_services[] = {
    &moesaic__v1__expert_service__descriptor,  &moesaic__v1__worker_service__descriptor,
    &moesaic__v1__cluster_service__descriptor, &moesaic__v1__inference_service__descriptor,
    &moesaic__v1__health__descriptor,          NULL,
};

const char *const moe_streaming_methods[] = {
    "/moesaic.v1.InferenceService/Generate",
    NULL,
};

static bool is_streaming(const char *full_name) {
    for (int i = 0; moe_streaming_methods[i]; i++)
        if (strcmp(moe_streaming_methods[i], full_name) == 0) return true;
    return false;
}

bool moe_method_find(const char *full_name, moe_method *out) {
    const char *slash = full_name[0] == '/' ? strchr(full_name + 1, '/') : NULL;
    if (!slash) return false;
    size_t service_length = (size_t)(slash - full_name) - 1;
    for (int i = 0; moe_services[i]; i++) {
        const ProtobufCServiceDescriptor *service = moe_services[i];
        if (strlen(service->name) != service_length || memcmp(service->name, full_name + 1, service_length) != 0) continue;
        const ProtobufCMethodDescriptor *method = protobuf_c_service_descriptor_get_method_by_name(service, slash + 1);
        if (!method) return false;
        *out = (moe_method){.request = method->input, .response = method->output, .server_streaming = is_streaming(full_name)};
        return true;
    }
    return false;
}
