// PyTorch asks a guard which CUDA device is current, also where it was built without CUDA or finds no driver: it is 0.
#include <c10/core/impl/DeviceGuardImplInterface.h>

using c10::Device;
using c10::DeviceType;
using c10::Stream;

namespace {

struct OneDevice final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device getDevice() const noexcept override { return {DeviceType::CUDA, 0}; }
  Device exchangeDevice(Device) const noexcept override { return getDevice(); }
  void setDevice(Device) const noexcept override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream getNewStream(Device device, int) const noexcept override { return getStream(device); }
  Stream exchangeStream(Stream) const noexcept override { return getStream(getDevice()); }
  // None, so that autograd starts no thread for it: emulated tensors are meta tensors to C++.
  c10::DeviceIndex deviceCount() const noexcept override { return 0; }
  void record(void**, const Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};

}  // namespace

extern "C" __attribute__((visibility("default"))) void install() {
  static OneDevice guard;
  c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(&guard);
}
