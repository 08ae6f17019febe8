/* The last steps of a timeline as SVG: a lane for the router's segments, one for experts, lanes for copies ahead and on demand. */
#pragma once
#include <stdio.h>

#include "common/timeline.h"

typedef struct moe_timeline_picture {
    const moe_timeline *timeline;
    const char *title;
    int32_t num_moe_layers;
} moe_timeline_picture;

/* Draws the newest whole steps of the timeline: two, or one where there are many layers. */
void moe_timeline_draw(FILE *out, const moe_timeline_picture *picture);
