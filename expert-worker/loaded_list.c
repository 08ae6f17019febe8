#include "expert-worker/loaded_list.h"

#include "common/alloc.h"

bool moe_loaded_list_init(moe_loaded_list *list, size_t capacity) {
    *list = (moe_loaded_list){.pointers = moe_calloc(capacity, sizeof *list->pointers),
                              .items = moe_calloc(capacity, sizeof *list->items),
                              .ids = moe_calloc(capacity, sizeof *list->ids)};
    return list->pointers && list->items && list->ids;
}

void moe_loaded_list_add(moe_loaded_list *list, const moe_shard *shard, int32_t layer, int32_t expert) {
    const moe_held_expert *held = moe_shard_at(shard, layer, expert);
    Moesaic__V1__ExpertId *id = &list->ids[list->count];
    Moesaic__V1__LoadedExpert *item = &list->items[list->count];
    moesaic__v1__expert_id__init(id);
    id->layer = (uint32_t)layer;
    id->expert = (uint32_t)expert;
    moesaic__v1__loaded_expert__init(item);
    item->id = id;
    item->digest = held->digest;
    item->bytes = (uint64_t)held->bytes;
    list->pointers[list->count++] = item;
}

void moe_loaded_list_free(moe_loaded_list *list) {
    moe_free(list->pointers);
    moe_free(list->items);
    moe_free(list->ids);
    *list = (moe_loaded_list){.count = 0};
}
