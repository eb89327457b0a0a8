// Fibers: threads of control that give way only where they say so. A CUDA thread becomes one of them.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>

// Saves the running fiber's registers and stack pointer in *from, and goes on where `to` was saved.
extern "C" void switch_fiber(void** from, void* to);

#if defined(__x86_64__)
asm(R"(
.text
.globl switch_fiber
.type switch_fiber, @function
switch_fiber:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl switch_fiber
.type switch_fiber, %function
switch_fiber:
  sub sp, sp, #176
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #176
  ret
)");
#else
#error "fibers are written for x86-64 and aarch64"
#endif

struct Fiber {
  static constexpr size_t kStack = 64 * 1024;
  std::unique_ptr<char[]> stack;
  void* saved = nullptr;
  bool done = false;

  // Makes the next switch to this fiber call `entry`, which must not return.
  void start(void (*entry)()) {
    if (!stack) stack.reset(new char[kStack]);
    char* top = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(stack.get() + kStack) & ~uintptr_t(15));
#if defined(__x86_64__)
    char* frame = top - 64;  // six registers, the return address, and 8 bytes as after a call
    memset(frame, 0, 64);
    memcpy(frame + 48, &entry, sizeof entry);
#else
    char* frame = top - 176;
    memset(frame, 0, 176);
    memcpy(frame + 88, &entry, sizeof entry);  // x30, the link register
#endif
    saved = frame;
    done = false;
  }
};
