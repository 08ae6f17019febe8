/* The highest logits of a row. */
#pragma once
#include <stdint.h>

/* ids, top [n]: the n ≤ count highest of logits [count], by descending logit, of equal ones the lower id first. Where a logit is
 * not finite, all ids are -1 and top is left as it is. */
void moe_cpu_top_logits(const float *logits, int32_t count, int32_t n, int32_t *ids, float *top);
