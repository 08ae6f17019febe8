/* The list of held experts that Load and Stats answer with. */
#pragma once
#include "expert-worker/shard.h"
#include "proto/rpc.h"

typedef struct moe_loaded_list {
    size_t count;
    Moesaic__V1__LoadedExpert **pointers; /* [count], for the message */
    Moesaic__V1__LoadedExpert *items;
    Moesaic__V1__ExpertId *ids;
} moe_loaded_list;

bool moe_loaded_list_init(moe_loaded_list *list, size_t capacity); /* false when out of memory; free it all the same */
void moe_loaded_list_add(moe_loaded_list *list, const moe_shard *shard, int32_t layer, int32_t expert);
void moe_loaded_list_free(moe_loaded_list *list);
