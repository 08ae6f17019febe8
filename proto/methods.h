/* The methods of moesaic.proto by full name, from protobuf-c's generated service descriptors. */
#pragma once
#include <stdbool.h>

#include "moesaic.pb-c.h"

typedef struct moe_method {
    const ProtobufCMessageDescriptor *request, *response;
    bool server_streaming;
} moe_method;

/* Finds "/moesaic.v1.Service/Method"; false when no service has it. */
bool moe_method_find(const char *full_name, moe_method *out);

/* The services, terminated by NULL. */
extern const ProtobufCServiceDescriptor *const moe_services[];
/* Full names of the server-streaming methods, terminated by NULL: protoc-c drops `stream`. */
extern const char *const moe_streaming_methods[];
