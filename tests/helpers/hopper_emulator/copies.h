// TMA: boxes of a matrix to shared memory, and bulk copies from there to global memory.
#pragma once

namespace emulator {

struct Map {  // hopper_emulator._Map; in the place of the hardware's 128 bytes
    const unsigned char* address;
    long long rows, columns;
    int element, box_rows, box_columns, swizzle;
};
struct Box { Map map; u32 target, barrier; int column, row; };
Box boxes[256];  // that have still to land
int pending_boxes;

u32 box_bytes(const Map& map) { return map.box_rows * map.box_columns * map.element; }

void land(const Box& box) {
    const Map& map = box.map;
    const int pitch = map.box_columns * map.element;
    const long long row_bytes = map.columns * map.element;
    for (int r = 0; r < map.box_rows; r++)
        for (int c = 0; c < pitch; c += 16) {
            unsigned char* const target = __start_shared_window + swizzled(box.target + r * pitch + c, map.swizzle);
            const long long row = box.row + r, byte = (long long)box.column * map.element + c;
            memset(target, 0, 16);  // outside of the matrix
            if (row < 0 || row >= map.rows || byte < 0 || byte >= row_bytes) continue;
            memcpy(target, map.address + row * row_bytes + byte, row_bytes - byte < 16 ? row_bytes - byte : 16);
        }
    Mbarrier& b = mbarriers[box.barrier];
    b.bytes -= box_bytes(map);
    end_phase(b);
}
void load_box(u32 target, const void* map, u32 barrier, int column, int row) {
    const Box box = {*(const Map*)map, target, (u32)find_mbarrier(barrier), column, row};
    if (target % 128) fail("TMA to shared address %u", target);
    unsigned char* const first = shared_at(target, box_bytes(box.map));
    if (coin()) return land(box);
    memset(first, RUBBISH_BYTE, box_bytes(box.map));
    if (pending_boxes == 256) fail("too many boxes");
    boxes[pending_boxes++] = box;
}
bool land_one() {
    if (pending_boxes == 0) return false;
    const int i = draw() % pending_boxes;
    land(boxes[i]);
    boxes[i] = boxes[--pending_boxes];
    return true;
}
void copy_now(const Copy& copy) { memcpy(copy.target, shared_at(copy.source, copy.bytes), copy.bytes); }
void bulk_store(void* target, u32 source, u32 bytes) {
    if ((size_t)target % 16 || bytes % 16) fail("a bulk copy of %u bytes to %p", bytes, target);
    if (coin()) return copy_now({target, source, bytes});
    if (current->pending_copies == 4) fail("too many copies");
    current->copies[current->pending_copies++] = {target, source, bytes};
}
void bulk_commit_and_wait() {
    while (current->pending_copies) copy_now(current->copies[--current->pending_copies]);
}

}  // namespace emulator
