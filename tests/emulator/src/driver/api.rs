//! The exported symbols, as cudarc's bindings name them.
//!
//! Each takes the process's lock for its whole duration. What is not modelled is exported too
//! where cudarc's safe layers could call it, and refuses with a message.

use std::ffi::{CStr, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::{
    CAPTURE_RELAXED, CURRENT, Call, Capture, Code, Event, FIRST_HANDLE, Function, Handle,
    KernelWork, Node, State, Work, errors, lock,
};
use crate::fatbin;

/// Where a call puts a result.
#[repr(transparent)]
pub struct Out<T>(*mut T);

impl<T> Clone for Out<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Out<T> {}

impl<T> From<&mut T> for Out<T> {
    fn from(place: &mut T) -> Self {
        Out(place)
    }
}

impl<T> Out<T> {
    fn set(self, value: T) -> Call {
        if self.0.is_null() {
            return Err(1);
        }
        // SAFETY: the driver API asks for a valid pointer or null.
        unsafe { self.0.write(value) };
        Ok(())
    }

    fn set_if_wanted(self, value: T) {
        let _ = self.set(value);
    }
}

/// A zero-terminated name.
#[repr(transparent)]
pub struct Name(*const c_char);

impl From<&CStr> for Name {
    fn from(text: &CStr) -> Self {
        Name(text.as_ptr())
    }
}

impl Name {
    fn text(&self) -> Call<String> {
        if self.0.is_null() {
            return Err(1);
        }
        // SAFETY: the driver API asks for a zero-terminated string.
        Ok(unsafe { CStr::from_ptr(self.0) }.to_string_lossy().into_owned())
    }
}

fn entry(name: &str, call: impl FnOnce(&mut State) -> Call) -> Code {
    match catch_unwind(AssertUnwindSafe(|| call(&mut lock()))) {
        Ok(Ok(())) => 0,
        Ok(Err(code)) => code,
        Err(_) => {
            eprintln!("pointwise emulator: {name} panicked; this is a defect of the emulator");
            999
        }
    }
}

macro_rules! api {
    ($(fn $name:ident($($arg:ident: $ty:ty),* $(,)?) |$state:ident| $body:block)*) => {$(
        #[doc = concat!("`", stringify!($name), "` of the CUDA driver API.")]
        #[unsafe(no_mangle)]
        #[allow(
            non_snake_case,
            clippy::not_unsafe_ptr_arg_deref,
            reason = "the API is given"
        )]
        pub extern "C" fn $name($($arg: $ty),*) -> Code {
            entry(stringify!($name), |$state| $body)
        }
    )*};
}

macro_rules! refuse {
    ($($name:ident)*) => {$(
        #[doc = concat!("`", stringify!($name), "` of the CUDA driver API: not modelled.")]
        #[unsafe(no_mangle)]
        #[allow(non_snake_case, reason = "the API is given")]
        pub extern "C" fn $name() -> Code {
            entry(stringify!($name), |s| {
                Err(s.complain(801, concat!(stringify!($name), " is not modelled")))
            })
        }
    )*};
}

refuse! {
    cuCtxCreate_v2 cuCtxCreate_v3 cuCtxCreate_v4 cuCtxDestroy_v2 cuCtxSetLimit cuCtxGetLimit
    cuCtxSetCacheConfig cuCtxGetCacheConfig cuDevicePrimaryCtxReset_v2
    cuModuleLoad cuMemAllocManaged cuMemPrefetchAsync_v2 cuMemAdvise_v2 cuStreamAttachMemAsync
    cuMemPoolCreate cuMemPoolDestroy cuImportExternalMemory cuDestroyExternalMemory
    cuExternalMemoryGetMappedBuffer cuProfilerStart cuProfilerStop
    cuOccupancyMaxPotentialClusterSize cuOccupancyMaxActiveClusters
    cuTensorMapEncodeTiled cuTensorMapEncodeIm2col cuTensorMapReplaceAddress
    cuThreadExchangeStreamCaptureMode cuMemcpyPeerAsync cuMemcpyPeer cuGraphExecUpdate_v2
    cuCtxEnablePeerAccess cuMemcpy2D_v2 cuMemcpy2DAsync_v2
}

/// The text of the last fault or refusal of this process, empty if there was none. It stays valid
/// until the next one.
#[unsafe(no_mangle)]
pub extern "C" fn pw_emulator_last_fault() -> *const c_char {
    lock().last_fault.as_ptr()
}

fn pool(device: usize) -> Handle {
    FIRST_HANDLE - 0x2000 - device * 16
}

impl State {
    fn pool_device(&self, handle: Handle) -> Call<usize> {
        (0..self.devices.len()).find(|&d| pool(d) == handle).ok_or(400)
    }

    /// Memory of the graph that `stream` captures, if it does: it has one address for good, and is there
    /// from the node that allocates it to the one that frees it.
    fn allocate_in_graph(
        &mut self,
        device: usize,
        size: usize,
        stream: Handle,
        place: Out<u64>,
    ) -> Call<bool> {
        let stream = self.stream(device, stream)?;
        if self.streams[&stream].capture.is_none() {
            return Ok(false);
        }
        let Some(address) = self.devices[device].memory.allocate_in_graph(size as u64) else {
            return Err(2);
        };
        self.enqueue(stream, Work::Begin(address))?;
        place.set(address)?;
        Ok(true)
    }

    /// Frees a graph's memory, when its last handle has gone. What is still queued keeps it.
    fn drop_graph(&mut self, graph: Option<(usize, Arc<Vec<Node>>)>) -> Call {
        let (device, nodes) = graph.ok_or(400_u32)?;
        for node in Arc::try_unwrap(nodes).unwrap_or_default() {
            if let Work::Begin(address) = node.work {
                self.left.remove(&address);
                self.devices[device].memory.drop_graph(address);
            }
        }
        Ok(())
    }

    /// Refuses to free memory of a graph outside of it, but for what a launch has left.
    fn free_left(&mut self, device: usize, address: u64) -> Call {
        if self.devices[device].memory.of_graph(address) && !self.left.remove(&address) {
            let text =
                format!("{address:#x} is memory of a graph that has freed it or not allocated it");
            return Err(self.complain(1, &text));
        }
        Ok(())
    }

    /// Refuses an allocation in the order of `stream` while that captures.
    fn refuse_capture(&mut self, device: usize, stream: Handle) -> Call {
        let stream = self.stream(device, stream)?;
        if let Some(capture) = self.streams[&stream].capture {
            let code = self.invalidate(capture, 900);
            return Err(self.complain(code, "allocations inside a capture are not modelled"));
        }
        Ok(())
    }

    fn allocate(&mut self, device: usize, size: usize, place: Out<u64>) -> Call {
        if size == 0 {
            return Err(1);
        }
        let name = String::from("an allocation");
        match self.devices[device].memory.allocate(size as u64, name) {
            Some(address) => place.set(address),
            None => Err(2),
        }
    }

    /// Whether a host range lies in pinned memory.
    fn is_pinned(&self, address: usize, len: usize) -> bool {
        self.pinned.range(..=address).next_back().is_some_and(|(&base, &(size, _))| {
            address - base <= size && size - (address - base) >= len
        })
    }

    fn upload(&mut self, to: u64, from: usize, len: usize, stream: Handle, wait: bool) -> Call {
        let device = self.current()?;
        let stream = self.stream(device, stream)?;
        if len == 0 {
            return Ok(());
        }
        if wait {
            self.unsafe_call()?;
        }
        let work = if self.is_pinned(from, len) {
            Work::UploadPinned(to, from, len as u64)
        } else {
            if from == 0 {
                return Err(1);
            }
            // Pageable memory is staged before the call returns.
            // SAFETY: the driver API asks for `len` readable bytes.
            let bytes = unsafe { std::slice::from_raw_parts(from as *const u8, len) };
            Work::Upload(to, Arc::new(bytes.to_vec()))
        };
        let id = self.enqueue(stream, work)?;
        if wait { self.run_until(stream, id) } else { Ok(()) }
    }

    fn download(&mut self, to: usize, from: u64, len: usize, stream: Handle, wait: bool) -> Call {
        let device = self.current()?;
        let stream = self.stream(device, stream)?;
        if len == 0 {
            return Ok(());
        }
        if to == 0 {
            return Err(1);
        }
        if wait {
            self.unsafe_call()?;
        }
        let id = self.enqueue(stream, Work::Download(to, from, len as u64))?;
        // A copy to pageable memory returns when it is complete.
        if id != 0 && (wait || !self.is_pinned(to, len)) {
            return self.run_until(stream, id);
        }
        Ok(())
    }

    fn device_copy(&mut self, to: u64, from: u64, len: usize, stream: Handle, wait: bool) -> Call {
        let device = self.current()?;
        let stream = self.stream(device, stream)?;
        if wait {
            self.unsafe_call()?;
        }
        self.enqueue(stream, Work::Copy(to, from, len as u64))?;
        Ok(())
    }

    fn fill(
        &mut self,
        to: u64,
        value: u32,
        size: usize,
        count: usize,
        stream: Handle,
        wait: bool,
    ) -> Call {
        let device = self.current()?;
        let stream = self.stream(device, stream)?;
        if !to.is_multiple_of(size as u64) {
            return Err(1);
        }
        if count == 0 {
            return Ok(());
        }
        if wait {
            self.unsafe_call()?;
        }
        self.enqueue(stream, Work::Fill(to, value.to_le_bytes(), size, count as u64))?;
        Ok(())
    }

    fn is_device_address(&self, address: u64) -> bool {
        self.devices.iter().any(|d| d.memory.range(address).is_some())
    }

    fn any_copy(&mut self, to: u64, from: u64, len: usize, stream: Handle, wait: bool) -> Call {
        match (self.is_device_address(to), self.is_device_address(from)) {
            (true, true) => self.device_copy(to, from, len, stream, wait),
            (true, false) => self.upload(to, from as usize, len, stream, wait),
            (false, true) => self.download(to as usize, from, len, stream, wait),
            (false, false) => Err(1),
        }
    }

    fn pointer_attribute(&self, attribute: u32, address: u64, place: *mut c_void) -> Call {
        if place.is_null() {
            return Err(1);
        }
        let found = self
            .devices
            .iter()
            .enumerate()
            .find_map(|(d, device)| device.memory.range(address).map(|range| (d, range)));
        let pinned = self.is_pinned(address as usize, 1);
        if found.is_none() && !pinned {
            return Err(1);
        }
        // SAFETY: the driver API asks for a place of the attribute's type.
        let put32 = |value: u32| unsafe { place.cast::<u32>().write(value) };
        // SAFETY: as above.
        let put64 = |value: u64| unsafe { place.cast::<u64>().write(value) };
        match (attribute, found) {
            (1, Some((device, _))) => put64(State::context(device) as u64),
            (2, Some(_)) => put32(2),
            (2, None) => put32(1),
            (3, Some(_)) => put64(address),
            (4, None) => put64(address),
            (8, _) => put32(0),
            (9, Some((device, _))) => put32(device as u32),
            (11, Some((_, (base, _)))) => put64(base),
            (12, Some((_, (_, size)))) => put64(size),
            _ => return Err(1),
        }
        Ok(())
    }

    fn load(&mut self, place: Out<Handle>, image: *const c_void) -> Call {
        let device = self.current()?;
        if image.is_null() {
            return Err(1);
        }
        // SAFETY: the driver API asks for a module image.
        let image = match unsafe { fatbin::copy(image.cast()) } {
            Ok(image) => image,
            Err(e) => return Err(self.complain(e.code, &e.text)),
        };
        let module = self.load_module(device, &image)?;
        place.set(module)
    }

    fn launch(
        &mut self,
        function: Handle,
        grid: [u32; 3],
        block: [u32; 3],
        shared: u32,
        stream: Handle,
        arguments: [*mut *mut c_void; 2],
    ) -> Call {
        let device = self.current()?;
        let stream = self.stream(device, stream)?;
        let Some(f) = self.functions.get(&function) else {
            return Err(self.complain(400, "the function's module has been unloaded"));
        };
        let (kernel, max_dynamic) = (f.kernel.clone(), f.max_dynamic);
        if f.device != device {
            return Err(self.complain(400, "the function belongs to another context"));
        }
        self.check_edited()?;
        let threads: u64 = block.iter().map(|&n| u64::from(n)).product();
        let blocks: u64 = grid.iter().map(|&n| u64::from(n)).product();
        let name = &kernel.name;
        let fits =
            grid.iter().zip([i32::MAX as u32, 65_535, 65_535]).all(|(&n, max)| n > 0 && n <= max)
                && block.iter().zip([1024, 1024, 64]).all(|(&n, max)| n > 0 && n <= max);
        if !fits || threads > 1024 {
            let text = format!("kernel '{name}': grid {grid:?} or block {block:?} is not possible");
            return Err(self.complain(1, &text));
        }
        if blocks > u64::from(u32::MAX) {
            return Err(self.complain(801, "more than 2^32 blocks are not modelled"));
        }
        if kernel.required_threads.is_some_and(|required| required != block) {
            let text = format!("kernel '{name}' needs blocks of {:?}", kernel.required_threads);
            return Err(self.complain(1, &text));
        }
        if kernel.max_threads.is_some_and(|max| threads > max.into()) {
            let text = format!("kernel '{name}': {threads} threads exceed its launch bounds");
            return Err(self.complain(701, &text));
        }
        // Without an attribute a block may have 48 KiB in all.
        let default = (48_u32 << 10).saturating_sub(kernel.static_shared);
        if shared > default.max(max_dynamic) {
            let text = format!(
                "kernel '{name}': {shared} bytes of dynamic shared memory, {} are allowed \
                 (CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES raises that)",
                default.max(max_dynamic)
            );
            return Err(self.complain(1, &text));
        }
        let params = parameters(&kernel, arguments)?;
        let work = KernelWork { kernel, grid, block, dynamic_shared: shared, params };
        self.enqueue(stream, Work::Kernel(Arc::new(work)))?;
        Ok(())
    }

    fn begin_capture(&mut self, stream: Handle, mode: u32) -> Call {
        let device = self.current()?;
        let stream = self.stream(device, stream)?;
        if stream == self.devices[device].legacy {
            return Err(self.complain(900, "the legacy stream cannot be captured"));
        }
        if mode > CAPTURE_RELAXED {
            return Err(1);
        }
        let id = self.next_work;
        self.next_work += 1;
        let s = self.streams.get_mut(&stream).ok_or(400_u32)?;
        if s.capture.is_some() {
            return Err(401);
        }
        s.capture = Some(id);
        self.captures.insert(
            id,
            Capture {
                origin: stream,
                mode,
                thread: std::thread::current().id(),
                nodes: Vec::new(),
                tails: [(stream, Vec::new())].into(),
                invalid: false,
            },
        );
        Ok(())
    }

    fn end_capture(&mut self, stream: Handle, place: Out<Handle>) -> Call {
        let device = self.current()?;
        let stream = self.stream(device, stream)?;
        place.set(0)?;
        let id = self.streams[&stream].capture.ok_or(401_u32)?;
        let capture = self.captures.get(&id).ok_or(401_u32)?;
        if capture.origin != stream {
            return Err(self.invalidate(id, 903));
        }
        if capture.mode != CAPTURE_RELAXED && capture.thread != std::thread::current().id() {
            return Err(self.invalidate(id, 908));
        }
        for s in self.streams.values_mut().filter(|s| s.capture == Some(id)) {
            s.capture = None;
        }
        let capture = self.captures.remove(&id).ok_or(401_u32)?;
        if capture.invalid {
            return Err(901);
        }
        // Everything must lead back to the stream in which the capture began.
        let mut reached = vec![false; capture.nodes.len()];
        let mut stack: Vec<usize> = capture.tails[&stream].clone();
        while let Some(node) = stack.pop() {
            if !std::mem::replace(&mut reached[node], true) {
                stack.extend(&capture.nodes[node].after);
            }
        }
        if reached.contains(&false) {
            return Err(self.complain(904, "a stream that joined the capture was not joined back"));
        }
        let graph = self.handle();
        self.graphs.insert(graph, (device, Arc::new(capture.nodes)));
        place.set(graph)
    }

    fn record(&mut self, event: Handle, stream: Handle) -> Call {
        let device = self.current()?;
        let stream = self.stream(device, stream)?;
        let Some(e) = self.events.get(&event) else {
            return Err(400);
        };
        if e.device != device {
            return Err(self.complain(400, "the event belongs to another context"));
        }
        if let Some(capture) = self.streams[&stream].capture {
            let tails = match self.captures.get(&capture) {
                Some(c) if c.invalid => return Err(901),
                Some(c) => c.tails[&stream].clone(),
                None => return Err(901),
            };
            let e = self.events.get_mut(&event).ok_or(400_u32)?;
            e.captured = Some((capture, tails));
            return Ok(());
        }
        let serial = e.serial + 1;
        let id = self.enqueue(stream, Work::Record(event, serial))?;
        let e = self.events.get_mut(&event).ok_or(400_u32)?;
        (e.record, e.serial, e.captured) = (Some((stream, id)), serial, None);
        Ok(())
    }

    fn wait_event(&mut self, stream: Handle, event: Handle) -> Call {
        let device = self.current()?;
        let stream = self.stream(device, stream)?;
        let Some(e) = self.events.get(&event) else {
            return Err(400);
        };
        let (record, captured) = (e.record, e.captured.clone());
        let here = self.streams[&stream].capture;
        match (here, captured) {
            (Some(mine), Some((theirs, nodes))) if mine == theirs => {
                let capture = self.captures.get_mut(&mine).ok_or(901_u32)?;
                if capture.invalid {
                    return Err(901);
                }
                capture.tails.entry(stream).or_default().extend(nodes);
                Ok(())
            }
            (Some(mine), Some((theirs, _))) if self.captures.contains_key(&theirs) => {
                Err(self.invalidate(mine, 902))
            }
            (Some(mine), _) => {
                let code = self.invalidate(mine, 905);
                Err(self
                    .complain(code, "a capturing stream waits for an event that was not captured"))
            }
            (None, Some((theirs, nodes))) => {
                if stream == self.devices[device].legacy {
                    return Err(self.invalidate(theirs, 906));
                }
                let Some(capture) = self.captures.get_mut(&theirs) else {
                    return Err(self.complain(907, "the event was last recorded in a capture"));
                };
                // The stream joins the capture.
                capture.tails.insert(stream, nodes);
                if let Some(s) = self.streams.get_mut(&stream) {
                    s.capture = Some(theirs);
                }
                Ok(())
            }
            (None, None) => {
                let Some(record) = record else { return Ok(()) };
                let id = self.enqueue(stream, Work::Wait)?;
                let s = self.streams.get_mut(&stream).ok_or(400_u32)?;
                if let Some(queued) = s.queue.iter_mut().find(|q| q.id == id)
                    && record.0 != stream
                {
                    queued.after.push(record);
                }
                Ok(())
            }
        }
    }

    /// Runs what an event stands for; with `wait` all of it, else one piece of work per call, so
    /// that a program which polls gets there.
    fn event_done(&mut self, event: Handle, wait: bool) -> Call {
        self.current()?;
        let Some(e) = self.events.get(&event) else {
            return Err(400);
        };
        if let Some((capture, _)) = e.captured {
            self.invalidate(capture, 907);
            return Err(self.complain(907, "the event was last recorded in a capture"));
        }
        let Some((stream, id)) = e.record else { return Ok(()) };
        if wait {
            return self.run_until(stream, id);
        }
        self.progress(stream, id)
    }

    fn progress(&mut self, stream: Handle, id: u64) -> Call {
        let next = self.streams.get(&stream).and_then(|s| s.queue.front()).map(|q| q.id);
        match next {
            Some(next) if next <= id => {
                self.run_until(stream, next)?;
                Err(600)
            }
            _ => Ok(()),
        }
    }

    fn elapsed(&mut self, place: Out<f32>, first: Handle, second: Handle) -> Call {
        self.current()?;
        let time = |s: &State, event: Handle| -> Call<_> {
            let e = s.events.get(&event).ok_or(400_u32)?;
            if !e.timing || e.record.is_none() {
                return Err(400);
            }
            if e.captured.is_some() {
                return Err(907);
            }
            match e.ran {
                Some((serial, time)) if serial == e.serial => Ok(time),
                _ => Err(600),
            }
        };
        let (a, b) = (time(self, first)?, time(self, second)?);
        let seconds = if b >= a { (b - a).as_secs_f32() } else { -(a - b).as_secs_f32() };
        place.set(seconds * 1000.0)
    }

    fn blocks_per_processor(&mut self, function: Handle, threads: i32, shared: usize) -> Call<i32> {
        self.current()?;
        let f = self.functions.get(&function).ok_or(400_u32)?;
        let threads = u32::try_from(threads).map_err(|_| 1_u32)?;
        if threads == 0 || threads > 1024 || f.kernel.max_threads.is_some_and(|max| threads > max) {
            return Ok(0);
        }
        let total = f.kernel.static_shared + shared as u32;
        Ok(self.config()?.occupancy(threads, total))
    }
}

/// Copies a kernel's parameters, given one by one or as one buffer.
fn parameters(
    kernel: &crate::isa::Kernel,
    [pointers, extra]: [*mut *mut c_void; 2],
) -> Call<Vec<u8>> {
    let mut bytes = vec![0_u8; kernel.param_bytes as usize];
    if !pointers.is_null() {
        for (i, &(offset, size)) in kernel.params.iter().enumerate() {
            // SAFETY: the driver API asks for one pointer per parameter, to as many bytes as the
            // kernel declares.
            let from = unsafe { pointers.add(i).read() }.cast::<u8>();
            if from.is_null() {
                return Err(1);
            }
            let to = &mut bytes[offset as usize..(offset + size) as usize];
            // SAFETY: as above.
            unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), size as usize) };
        }
        return Ok(bytes);
    }
    if extra.is_null() {
        return if kernel.params.is_empty() { Ok(bytes) } else { Err(1) };
    }
    let (mut buffer, mut size) = (std::ptr::null::<u8>(), 0);
    for i in (0..).step_by(2) {
        // SAFETY: the list is (key, value) pairs up to a zero key.
        let (key, value) = unsafe {
            let key = extra.add(i).read() as usize;
            (key, if key == 0 { std::ptr::null_mut() } else { extra.add(i + 1).read() })
        };
        match key {
            0 => break,
            1 => buffer = value.cast(),
            // SAFETY: key 2 comes with a pointer to a size.
            2 => size = unsafe { value.cast::<usize>().read() },
            _ => return Err(1),
        }
    }
    if buffer.is_null() || size < bytes.len() {
        return Err(1);
    }
    let len = bytes.len();
    // SAFETY: the buffer has `size` bytes, which are enough.
    unsafe { std::ptr::copy_nonoverlapping(buffer, bytes.as_mut_ptr(), len) };
    Ok(bytes)
}

/// `CUlaunchConfig`.
#[repr(C)]
pub struct LaunchConfig {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Dynamic shared memory.
    pub shared: u32,
    /// Stream.
    pub stream: Handle,
    /// Attributes.
    pub attributes: *const LaunchAttribute,
    /// How many.
    pub count: u32,
}

/// `CUlaunchAttribute`.
#[repr(C, align(8))]
pub struct LaunchAttribute {
    /// Which.
    pub id: u32,
    /// Unused.
    pub pad: u32,
    /// Its value, beginning with up to three words.
    pub value: [u32; 16],
}

/// Allocates pinned memory; poisoned, as fresh memory may hold anything.
fn pin(s: &mut State, place: Out<usize>, size: usize) -> Call {
    s.current()?;
    s.unsafe_call()?;
    if size == 0 {
        return Err(1);
    }
    let layout = std::alloc::Layout::from_size_align(size, 4096).map_err(|_| 2_u32)?;
    // SAFETY: the layout has a size.
    let memory = unsafe { std::alloc::alloc(layout) };
    if memory.is_null() {
        return Err(2);
    }
    // SAFETY: `size` bytes were just allocated.
    unsafe { memory.write_bytes(0x7f, size) };
    s.pinned.insert(memory as usize, (size, true));
    place.set(memory as usize)
}

api! {
    fn cuInit(flags: u32) |s| {
        if flags != 0 {
            return Err(1);
        }
        s.init()
    }

    fn cuDriverGetVersion(version: Out<i32>) |s| {
        let driver = s.config()?.driver;
        version.set(driver)
    }

    fn cuDeviceGetCount(count: Out<i32>) |s| {
        if !s.initialised {
            return Err(3);
        }
        count.set(s.devices.len() as i32)
    }

    fn cuDeviceGet(device: Out<i32>, ordinal: i32) |s| {
        s.device(ordinal)?;
        device.set(ordinal)
    }

    fn cuDeviceGetName(name: *mut c_char, len: i32, device: i32) |s| {
        s.device(device)?;
        if name.is_null() || len <= 0 {
            return Err(1);
        }
        let text = s.config()?.name();
        let count = text.len().min(len as usize - 1);
        // SAFETY: the driver API asks for `len` writable bytes, and count < len.
        unsafe {
            std::ptr::copy_nonoverlapping(text.as_ptr().cast(), name, count);
            name.add(count).write(0);
        }
        Ok(())
    }

    fn cuDeviceGetUuid(uuid: Out<[u8; 16]>, device: i32) |s| {
        let device = s.device(device)?;
        let mut bytes = *b"pointwise-emu-00";
        bytes[15] += device as u8;
        uuid.set(bytes)
    }

    fn cuDeviceGetUuid_v2(uuid: Out<[u8; 16]>, device: i32) |s| {
        let device = s.device(device)?;
        let mut bytes = *b"pointwise-emu-00";
        bytes[15] += device as u8;
        uuid.set(bytes)
    }

    fn cuDeviceTotalMem_v2(bytes: Out<usize>, device: i32) |s| {
        let device = s.device(device)?;
        bytes.set(s.devices[device].memory.info().1 as usize)
    }

    fn cuDeviceGetAttribute(value: Out<i32>, attribute: i32, device: i32) |s| {
        s.device(device)?;
        match s.config()?.attribute(attribute) {
            Some(found) => value.set(found),
            None => Err(s.complain(1, &format!("device attribute {attribute} is not modelled"))),
        }
    }

    fn cuDeviceCanAccessPeer(can: Out<i32>, device: i32, peer: i32) |s| {
        s.device(device)?;
        s.device(peer)?;
        can.set(0)
    }

    fn cuDevicePrimaryCtxRetain(context: Out<Handle>, device: i32) |s| {
        let device = s.device(device)?;
        s.devices[device].retained += 1;
        context.set(State::context(device))
    }

    fn cuDevicePrimaryCtxRelease_v2(device: i32) |s| {
        let device = s.device(device)?;
        let retained = &mut s.devices[device].retained;
        *retained = retained.checked_sub(1).ok_or(201_u32)?;
        Ok(())
    }

    fn cuDevicePrimaryCtxGetState(device: i32, flags: Out<u32>, active: Out<i32>) |s| {
        let device = s.device(device)?;
        flags.set(0)?;
        active.set(i32::from(s.devices[device].retained > 0))
    }

    fn cuDevicePrimaryCtxSetFlags_v2(device: i32, _flags: u32) |s| {
        s.device(device).map(|_| ())
    }

    fn cuCtxSetCurrent(context: Handle) |s| {
        if !s.initialised {
            return Err(3);
        }
        if context != 0 {
            s.context_device(context)?;
        }
        CURRENT.set(context);
        Ok(())
    }

    fn cuCtxGetCurrent(context: Out<Handle>) |s| {
        if !s.initialised {
            return Err(3);
        }
        context.set(CURRENT.get())
    }

    fn cuCtxGetDevice(device: Out<i32>) |s| {
        let current = s.current()?;
        device.set(current as i32)
    }

    fn cuCtxSetFlags(_flags: u32) |s| {
        s.current().map(|_| ())
    }

    fn cuCtxGetFlags(flags: Out<u32>) |s| {
        s.current()?;
        flags.set(0)
    }

    fn cuCtxGetApiVersion(_context: Handle, version: Out<u32>) |s| {
        s.current()?;
        version.set(3020)
    }

    fn cuCtxGetStreamPriorityRange(least: Out<i32>, greatest: Out<i32>) |s| {
        s.current()?;
        least.set_if_wanted(0);
        greatest.set_if_wanted(-5);
        Ok(())
    }

    fn cuCtxSynchronize() |s| {
        let device = s.current()?;
        s.synchronize_device(device)
    }

    fn cuMemGetInfo_v2(free: Out<usize>, total: Out<usize>) |s| {
        let device = s.current()?;
        let (f, t) = s.devices[device].memory.info();
        free.set(f as usize)?;
        total.set(t as usize)
    }

    fn cuMemAlloc_v2(address: Out<u64>, size: usize) |s| {
        let device = s.current()?;
        s.unsafe_call()?;
        s.allocate(device, size, address)
    }

    fn cuMemAllocAsync(address: Out<u64>, size: usize, stream: Handle) |s| {
        let device = s.current()?;
        if s.allocate_in_graph(device, size, stream, address)? {
            return Ok(());
        }
        s.allocate(device, size, address)
    }

    fn cuMemAllocFromPoolAsync(address: Out<u64>, size: usize, pool: Handle, stream: Handle) |s| {
        let device = s.current()?;
        if s.pool_device(pool)? != device {
            return Err(1);
        }
        s.refuse_capture(device, stream)?;
        s.allocate(device, size, address)
    }

    fn cuMemFree_v2(address: u64) |s| {
        let device = s.current()?;
        if address == 0 {
            return Ok(());
        }
        s.unsafe_call()?;
        s.finish(device)?;
        s.free_left(device, address)?;
        if s.devices[device].memory.free(address) {
            return Ok(());
        }
        Err(s.complain(1, &format!("{address:#x} is not the beginning of an allocation")))
    }

    fn cuMemFreeAsync(address: u64, stream: Handle) |s| {
        let device = s.current()?;
        let stream = s.stream(device, stream)?;
        if address == 0 {
            return Ok(());
        }
        if s.devices[device].memory.range(address).is_none_or(|(base, _)| base != address) {
            return Err(s.complain(1, &format!("{address:#x} is not the beginning of an allocation")));
        }
        if let Some(capture) = s.streams[&stream].capture {
            let of_graph = s.captures.get(&capture).is_some_and(|capture| {
                capture.nodes.iter().any(|n| matches!(n.work, Work::Begin(a) if a == address))
            });
            if of_graph {
                return s.enqueue(stream, Work::End(address)).map(|_| ());
            }
            let code = s.invalidate(capture, 900);
            return Err(s.complain(code, "only what a capture allocated can be freed in it"));
        }
        s.free_left(device, address)?;
        s.enqueue(stream, Work::Free(address)).map(|_| ())
    }

    fn cuMemGetAddressRange_v2(base: Out<u64>, size: Out<usize>, address: u64) |s| {
        let device = s.current()?;
        let (b, n) = s.devices[device].memory.range(address).ok_or(500_u32)?;
        base.set_if_wanted(b);
        size.set_if_wanted(n as usize);
        Ok(())
    }

    fn cuMemcpyHtoD_v2(to: u64, from: usize, len: usize) |s| { s.upload(to, from, len, 0, true) }

    fn cuMemcpyHtoDAsync_v2(to: u64, from: usize, len: usize, stream: Handle) |s| {
        s.upload(to, from, len, stream, false)
    }

    fn cuMemcpyDtoH_v2(to: usize, from: u64, len: usize) |s| { s.download(to, from, len, 0, true) }

    fn cuMemcpyDtoHAsync_v2(to: usize, from: u64, len: usize, stream: Handle) |s| {
        s.download(to, from, len, stream, false)
    }

    fn cuMemcpyDtoD_v2(to: u64, from: u64, len: usize) |s| { s.device_copy(to, from, len, 0, true) }

    fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, len: usize, stream: Handle) |s| {
        s.device_copy(to, from, len, stream, false)
    }

    fn cuMemcpy(to: u64, from: u64, len: usize) |s| { s.any_copy(to, from, len, 0, true) }

    fn cuMemcpyAsync(to: u64, from: u64, len: usize, stream: Handle) |s| {
        s.any_copy(to, from, len, stream, false)
    }

    fn cuMemsetD8_v2(to: u64, value: u8, count: usize) |s| {
        s.fill(to, value.into(), 1, count, 0, true)
    }

    fn cuMemsetD16_v2(to: u64, value: u16, count: usize) |s| {
        s.fill(to, value.into(), 2, count, 0, true)
    }

    fn cuMemsetD32_v2(to: u64, value: u32, count: usize) |s| { s.fill(to, value, 4, count, 0, true) }

    fn cuMemsetD8Async(to: u64, value: u8, count: usize, stream: Handle) |s| {
        s.fill(to, value.into(), 1, count, stream, false)
    }

    fn cuMemsetD16Async(to: u64, value: u16, count: usize, stream: Handle) |s| {
        s.fill(to, value.into(), 2, count, stream, false)
    }

    fn cuMemsetD32Async(to: u64, value: u32, count: usize, stream: Handle) |s| {
        s.fill(to, value, 4, count, stream, false)
    }

    fn cuMemHostAlloc(address: Out<usize>, size: usize, _flags: u32) |s| { pin(s, address, size) }

    fn cuMemAllocHost_v2(address: Out<usize>, size: usize) |s| { pin(s, address, size) }

    fn cuMemFreeHost(address: usize) |s| {
        let device = s.current()?;
        s.unsafe_call()?;
        // Work that still reads or writes it comes first.
        s.finish(device)?;
        match s.pinned.get(&address) {
            Some(&(size, true)) => {
                s.pinned.remove(&address);
                let layout = std::alloc::Layout::from_size_align(size, 4096).map_err(|_| 1_u32)?;
                // SAFETY: `pin` allocated it with this layout, and it is forgotten now.
                unsafe { std::alloc::dealloc(address as *mut u8, layout) };
                Ok(())
            }
            _ => Err(1),
        }
    }

    fn cuMemHostRegister_v2(address: usize, size: usize, _flags: u32) |s| {
        s.current()?;
        if address == 0 || size == 0 {
            return Err(1);
        }
        s.pinned.insert(address, (size, false));
        Ok(())
    }

    fn cuMemHostUnregister(address: usize) |s| {
        let device = s.current()?;
        s.synchronize_device(device)?;
        match s.pinned.get(&address) {
            Some(&(_, false)) => {
                s.pinned.remove(&address);
                Ok(())
            }
            _ => Err(713),
        }
    }

    fn cuPointerGetAttribute(place: *mut c_void, attribute: u32, address: u64) |s| {
        s.current()?;
        s.pointer_attribute(attribute, address, place)
    }

    fn cuPointerGetAttributes(
        count: u32,
        attributes: *const u32,
        places: *const *mut c_void,
        address: u64,
    ) |s| {
        s.current()?;
        if attributes.is_null() || places.is_null() {
            return Err(1);
        }
        for i in 0..count as usize {
            // SAFETY: the driver API asks for `count` attributes and places.
            let (attribute, place) = unsafe { (attributes.add(i).read(), places.add(i).read()) };
            s.pointer_attribute(attribute, address, place)?;
        }
        Ok(())
    }

    fn cuDeviceGetDefaultMemPool(handle: Out<Handle>, device: i32) |s| {
        let device = s.device(device)?;
        if !s.config()?.pools {
            return Err(801);
        }
        handle.set(pool(device))
    }

    fn cuDeviceGetMemPool(handle: Out<Handle>, device: i32) |s| {
        let device = s.device(device)?;
        if !s.config()?.pools {
            return Err(801);
        }
        handle.set(pool(device))
    }

    fn cuDeviceSetMemPool(device: i32, handle: Handle) |s| {
        let device = s.device(device)?;
        if s.pool_device(handle)? == device { Ok(()) } else { Err(1) }
    }

    fn cuMemPoolSetAttribute(handle: Handle, attribute: u32, value: *const c_void) |s| {
        let device = s.pool_device(handle)?;
        if value.is_null() {
            return Err(1);
        }
        match attribute {
            // Reuse is the pool's own business: addresses are never reused here.
            1..=3 => Ok(()),
            4 => {
                // SAFETY: the release threshold is a 64-bit number.
                s.devices[device].threshold = unsafe { value.cast::<u64>().read() };
                Ok(())
            }
            _ => Err(1),
        }
    }

    fn cuMemPoolGetAttribute(handle: Handle, attribute: u32, value: *mut c_void) |s| {
        let device = s.pool_device(handle)?;
        if value.is_null() {
            return Err(1);
        }
        let (free, total) = s.devices[device].memory.info();
        match attribute {
            // SAFETY: these attributes are 32-bit numbers.
            1..=3 => unsafe { value.cast::<i32>().write(1) },
            // SAFETY: these attributes are 64-bit numbers.
            4 => unsafe { value.cast::<u64>().write(s.devices[device].threshold) },
            // SAFETY: as above.
            5..=8 => unsafe { value.cast::<u64>().write(total - free) },
            _ => return Err(1),
        }
        Ok(())
    }

    fn cuMemPoolTrimTo(handle: Handle, _keep: usize) |s| { s.pool_device(handle).map(|_| ()) }

    fn cuModuleLoadData(module: Out<Handle>, image: *const c_void) |s| { s.load(module, image) }

    // The options concern the compiler that a real driver would run; there is none here.
    fn cuModuleLoadDataEx(
        module: Out<Handle>,
        image: *const c_void,
        _count: u32,
        _options: *const u32,
        _values: *const *mut c_void,
    ) |s| {
        s.load(module, image)
    }

    fn cuModuleLoadFatBinary(module: Out<Handle>, image: *const c_void) |s| { s.load(module, image) }

    fn cuModuleUnload(module: Handle) |s| {
        let device = s.current()?;
        s.synchronize_device(device)?;
        let gone = s.modules.remove(&module).ok_or(400_u32)?;
        for (_, address, _) in gone.globals {
            s.devices[gone.device].memory.free(address);
        }
        s.functions.retain(|_, f| f.module != module);
        Ok(())
    }

    fn cuModuleGetLoadingMode(mode: Out<u32>) |s| {
        let _ = s;
        mode.set(1)
    }

    fn cuModuleGetFunction(function: Out<Handle>, module: Handle, name: Name) |s| {
        s.current()?;
        let name = name.text()?;
        let m = s.modules.get(&module).ok_or(400_u32)?;
        let Some(kernel) = m.kernels.get(&name) else {
            let text = format!("the module has no kernel '{name}'");
            return Err(s.complain(500, &text));
        };
        let found = Function {
            device: m.device,
            module,
            kernel: kernel.clone(),
            max_dynamic: 0,
            carveout: -1,
        };
        // One handle per kernel, as attributes belong to the kernel.
        let known = s
            .functions
            .iter()
            .find(|(_, f)| f.module == module && Arc::ptr_eq(&f.kernel, &found.kernel))
            .map(|(h, _)| *h);
        if let Some(handle) = known {
            return function.set(handle);
        }
        let handle = s.handle();
        s.functions.insert(handle, found);
        function.set(handle)
    }

    fn cuModuleGetGlobal_v2(address: Out<u64>, size: Out<usize>, module: Handle, name: Name) |s| {
        s.current()?;
        let name = name.text()?;
        let m = s.modules.get(&module).ok_or(400_u32)?;
        let (_, a, n) = m.globals.iter().find(|g| g.0 == name).ok_or(500_u32)?;
        address.set_if_wanted(*a);
        size.set_if_wanted(*n as usize);
        Ok(())
    }

    fn cuFuncGetAttribute(value: Out<i32>, attribute: i32, function: Handle) |s| {
        s.current()?;
        let arch = s.config()?.arch;
        let f = s.functions.get(&function).ok_or(400_u32)?;
        let threads = f.kernel.max_threads.unwrap_or(1024);
        let found = match attribute {
            0 => threads as i32,
            1 => f.kernel.static_shared as i32,
            2 => 0,
            3 => f.kernel.local as i32,
            // What the kernel's bounds leave: only ptxas knows what it takes.
            4 => (65_536 / threads.next_multiple_of(32) as i32).min(255),
            5 => f.kernel.version.1 as i32,
            6 => arch as i32,
            7 => 0,
            8 => f.max_dynamic.max((48_u32 << 10).saturating_sub(f.kernel.static_shared)) as i32,
            9 => f.carveout,
            _ => return Err(s.complain(1, &format!("function attribute {attribute} is not modelled"))),
        };
        value.set(found)
    }

    fn cuFuncSetAttribute(function: Handle, attribute: i32, value: i32) |s| {
        s.current()?;
        let limit = s.config()?.shared_optin();
        let f = s.functions.get_mut(&function).ok_or(400_u32)?;
        match attribute {
            8 => {
                let wanted = u32::try_from(value).map_err(|_| 1_u32)?;
                if wanted > limit.saturating_sub(f.kernel.static_shared) {
                    let text = format!(
                        "kernel '{}': {wanted} bytes of dynamic shared memory, the device allows \
                         {limit} in all",
                        f.kernel.name
                    );
                    return Err(s.complain(1, &text));
                }
                f.max_dynamic = wanted;
                Ok(())
            }
            9 if (-1..=100).contains(&value) => {
                f.carveout = value;
                Ok(())
            }
            _ => Err(s.complain(1, &format!("function attribute {attribute} cannot be set"))),
        }
    }

    fn cuFuncSetCacheConfig(function: Handle, _config: u32) |s| {
        s.functions.get(&function).map(|_| ()).ok_or(400)
    }

    fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
        blocks: Out<i32>,
        function: Handle,
        threads: i32,
        shared: usize,
    ) |s| {
        let found = s.blocks_per_processor(function, threads, shared)?;
        blocks.set(found)
    }

    fn cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
        blocks: Out<i32>,
        function: Handle,
        threads: i32,
        shared: usize,
        _flags: u32,
    ) |s| {
        let found = s.blocks_per_processor(function, threads, shared)?;
        blocks.set(found)
    }

    fn cuOccupancyMaxPotentialBlockSize(
        grid: Out<i32>,
        block: Out<i32>,
        function: Handle,
        shared_of: Option<extern "C" fn(i32) -> usize>,
        shared: usize,
        limit: i32,
    ) |s| {
        potential(s, grid, block, function, shared_of, shared, limit)
    }

    fn cuOccupancyMaxPotentialBlockSizeWithFlags(
        grid: Out<i32>,
        block: Out<i32>,
        function: Handle,
        shared_of: Option<extern "C" fn(i32) -> usize>,
        shared: usize,
        limit: i32,
        _flags: u32,
    ) |s| {
        potential(s, grid, block, function, shared_of, shared, limit)
    }

    fn cuOccupancyAvailableDynamicSMemPerBlock(
        bytes: Out<usize>,
        function: Handle,
        blocks: i32,
        _threads: i32,
    ) |s| {
        s.current()?;
        if blocks <= 0 {
            return Err(1);
        }
        let config = s.config()?;
        let (optin, reserved) = (config.shared_optin() as i32, config.attribute(111).unwrap_or(0));
        let processor = config.attribute(81).unwrap_or(0);
        let f = s.functions.get(&function).ok_or(400_u32)?;
        let each = (processor / blocks - reserved).min(optin) - f.kernel.static_shared as i32;
        bytes.set(each.max(0) as usize)
    }

    fn cuLaunchKernel(
        function: Handle,
        grid_x: u32,
        grid_y: u32,
        grid_z: u32,
        block_x: u32,
        block_y: u32,
        block_z: u32,
        shared: u32,
        stream: Handle,
        parameters: *mut *mut c_void,
        extra: *mut *mut c_void,
    ) |s| {
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        s.launch(function, grid, block, shared, stream, [parameters, extra])
    }

    fn cuLaunchKernelEx(
        config: *const LaunchConfig,
        function: Handle,
        parameters: *mut *mut c_void,
        extra: *mut *mut c_void,
    ) |s| {
        if config.is_null() {
            return Err(1);
        }
        // SAFETY: the driver API asks for a valid configuration.
        let config = unsafe { &*config };
        for i in 0..config.count as usize {
            // SAFETY: the configuration says how many attributes it has.
            let attribute = unsafe { &*config.attributes.add(i) };
            match attribute.id {
                // Nothing; priority; permission to overlap with the launch before, which a
                // driver need not use.
                0 | 6 | 8 => {}
                2 => cooperative(s, function, config.grid, config.block, config.shared)?,
                4 if attribute.value[..3].iter().all(|&n| n <= 1) => {}
                4 => return Err(s.complain(801, "clusters of more than one block are not modelled")),
                id => {
                    let text = format!("launch attribute {id} is not modelled");
                    return Err(s.complain(801, &text));
                }
            }
        }
        let LaunchConfig { grid, block, shared, stream, .. } = *config;
        s.launch(function, grid, block, shared, stream, [parameters, extra])
    }

    fn cuLaunchCooperativeKernel(
        function: Handle,
        grid_x: u32,
        grid_y: u32,
        grid_z: u32,
        block_x: u32,
        block_y: u32,
        block_z: u32,
        shared: u32,
        stream: Handle,
        parameters: *mut *mut c_void,
    ) |s| {
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        cooperative(s, function, grid, block, shared)?;
        s.launch(function, grid, block, shared, stream, [parameters, std::ptr::null_mut()])
    }

    fn cuLaunchHostFunc(stream: Handle, function: usize, data: usize) |s| {
        let device = s.current()?;
        let stream = s.stream(device, stream)?;
        if function == 0 {
            return Err(1);
        }
        s.enqueue(stream, Work::Host(function, data)).map(|_| ())
    }

    fn cuStreamCreate(stream: Out<Handle>, flags: u32) |s| {
        let device = s.current()?;
        if flags > 1 {
            return Err(1);
        }
        let handle = s.new_stream(device, flags & 1 == 1, flags, 0);
        stream.set(handle)
    }

    fn cuStreamCreateWithPriority(stream: Out<Handle>, flags: u32, priority: i32) |s| {
        let device = s.current()?;
        if flags > 1 {
            return Err(1);
        }
        let handle = s.new_stream(device, flags & 1 == 1, flags, priority.clamp(-5, 0));
        stream.set(handle)
    }

    fn cuStreamDestroy_v2(stream: Handle) |s| {
        let device = s.current()?;
        if stream == 0 || stream == super::LEGACY || stream == super::PER_THREAD {
            return Err(400);
        }
        let stream = s.stream(device, stream)?;
        if let Some(capture) = s.streams[&stream].capture {
            s.invalidate(capture, 901);
        }
        s.run_until(stream, u64::MAX)?;
        s.streams.remove(&stream);
        Ok(())
    }

    fn cuStreamSynchronize(stream: Handle) |s| {
        let device = s.current()?;
        let stream = s.stream(device, stream)?;
        s.synchronize_stream(stream)
    }

    fn cuStreamQuery(stream: Handle) |s| {
        let device = s.current()?;
        let stream = s.stream(device, stream)?;
        if let Some(capture) = s.streams[&stream].capture {
            return Err(s.invalidate(capture, 900));
        }
        s.progress(stream, u64::MAX)
    }

    fn cuStreamWaitEvent(stream: Handle, event: Handle, _flags: u32) |s| {
        s.wait_event(stream, event)
    }

    // A stream of another context is no error here: its context is the answer.
    fn cuStreamGetCtx(stream: Handle, context: Out<Handle>) |s| {
        let current = s.current()?;
        let device = match s.streams.get(&stream) {
            Some(other) => other.device,
            None => s.stream(current, stream).map(|_| current)?,
        };
        context.set(State::context(device))
    }

    fn cuStreamGetDevice(stream: Handle, place: Out<i32>) |s| {
        let device = s.current()?;
        let stream = s.stream(device, stream)?;
        place.set(s.streams[&stream].device as i32)
    }

    fn cuStreamGetFlags(stream: Handle, flags: Out<u32>) |s| {
        let device = s.current()?;
        let stream = s.stream(device, stream)?;
        flags.set(s.streams[&stream].flags)
    }

    fn cuStreamGetPriority(stream: Handle, priority: Out<i32>) |s| {
        let device = s.current()?;
        let stream = s.stream(device, stream)?;
        priority.set(s.streams[&stream].priority)
    }

    fn cuStreamGetId(stream: Handle, id: Out<u64>) |s| {
        let device = s.current()?;
        let stream = s.stream(device, stream)?;
        id.set(stream as u64)
    }

    fn cuStreamBeginCapture_v2(stream: Handle, mode: u32) |s| { s.begin_capture(stream, mode) }

    fn cuStreamEndCapture(stream: Handle, graph: Out<Handle>) |s| { s.end_capture(stream, graph) }

    fn cuStreamIsCapturing(stream: Handle, status: Out<u32>) |s| {
        let device = s.current()?;
        if stream == 0 || stream == super::LEGACY {
            s.refuse_implicit(device)?;
        }
        let stream = s.stream(device, stream)?;
        let capture = s.streams[&stream].capture.and_then(|id| s.captures.get(&id));
        status.set(capture.map_or(0, |c| if c.invalid { 2 } else { 1 }))
    }

    fn cuStreamGetCaptureInfo_v2(
        stream: Handle,
        status: Out<u32>,
        id: Out<u64>,
        graph: Out<Handle>,
        dependencies: Out<usize>,
        count: Out<usize>,
    ) |s| {
        let device = s.current()?;
        let stream = s.stream(device, stream)?;
        let capture = s.streams[&stream].capture;
        let invalid = capture.and_then(|id| s.captures.get(&id)).map(|c| c.invalid);
        status.set(invalid.map_or(0, |invalid| if invalid { 2 } else { 1 }))?;
        id.set_if_wanted(capture.unwrap_or(0));
        // A graph under construction cannot be edited here.
        graph.set_if_wanted(0);
        dependencies.set_if_wanted(0);
        count.set_if_wanted(0);
        Ok(())
    }

    fn cuEventCreate(event: Out<Handle>, flags: u32) |s| {
        let device = s.current()?;
        if flags > 7 {
            return Err(1);
        }
        let handle = s.handle();
        let timing = flags & 2 == 0;
        s.events.insert(handle, Event {
            device,
            timing,
            record: None,
            serial: 0,
            ran: None,
            captured: None,
        });
        event.set(handle)
    }

    fn cuEventRecord(event: Handle, stream: Handle) |s| { s.record(event, stream) }

    fn cuEventRecordWithFlags(event: Handle, stream: Handle, flags: u32) |s| {
        if flags != 0 {
            return Err(s.complain(801, "flags of cuEventRecordWithFlags are not modelled"));
        }
        s.record(event, stream)
    }

    fn cuEventSynchronize(event: Handle) |s| { s.event_done(event, true) }

    fn cuEventQuery(event: Handle) |s| { s.event_done(event, false) }

    fn cuEventElapsedTime(time: Out<f32>, first: Handle, second: Handle) |s| {
        s.elapsed(time, first, second)
    }

    fn cuEventElapsedTime_v2(time: Out<f32>, first: Handle, second: Handle) |s| {
        s.elapsed(time, first, second)
    }

    fn cuEventDestroy_v2(event: Handle) |s| {
        s.current()?;
        s.events.remove(&event).map(|_| ()).ok_or(400)
    }

    fn cuGraphInstantiateWithFlags(exec: Out<Handle>, graph: Handle, flags: u64) |s| {
        s.current()?;
        // 1: a launch frees what the one before has left. 8: priorities of nodes.
        if flags & !(1 | 8) != 0 {
            return Err(s.complain(801, &format!("graph flags {flags} are not modelled")));
        }
        let graph = s.graphs.get(&graph).ok_or(400_u32)?.clone();
        let has_memory = graph.1.iter().any(|node| matches!(node.work, Work::Begin(_)));
        if has_memory && s.execs.values().any(|exec| Arc::ptr_eq(&exec.1, &graph.1)) {
            return Err(s.complain(801, "a graph with memory of its own is instantiated once at a time"));
        }
        let handle = s.handle();
        s.execs.insert(handle, graph);
        if flags & 1 != 0 {
            s.auto_free.insert(handle);
        }
        exec.set(handle)
    }

    fn cuGraphLaunch(exec: Handle, stream: Handle) |s| {
        let device = s.current()?;
        let stream = s.stream(device, stream)?;
        let (owner, nodes) = s.execs.get(&exec).ok_or(400_u32)?.clone();
        if owner != device {
            return Err(400);
        }
        let allocated = nodes.iter().filter_map(|node| match node.work {
            Work::Begin(address) => Some(address),
            _ => None,
        });
        let freed = |address| nodes.iter().any(|n| matches!(n.work, Work::End(a) if a == address));
        let left: Vec<u64> = allocated.filter(|&address| !freed(address)).collect();
        if !s.auto_free.contains(&exec)
            && let Some(address) = left.iter().find(|address| s.left.contains(address))
        {
            let text = format!(
                "a graph cannot be launched again before {address:#x}, which it has allocated, is freed \
                 (or with CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH)"
            );
            return Err(s.complain(1, &text));
        }
        s.enqueue(stream, Work::Graph(nodes))?;
        s.left.extend(left);
        Ok(())
    }

    fn cuGraphUpload(exec: Handle, stream: Handle) |s| {
        let device = s.current()?;
        s.stream(device, stream)?;
        s.execs.get(&exec).map(|_| ()).ok_or(400)
    }

    fn cuGraphGetNodes(graph: Handle, nodes: *mut Handle, count: Out<usize>) |s| {
        s.current()?;
        let (_, found): &(usize, Arc<Vec<Node>>) = s.graphs.get(&graph).ok_or(400_u32)?;
        if !nodes.is_null() {
            return Err(801);
        }
        count.set(found.len())
    }

    fn cuGraphExecDestroy(exec: Handle) |s| {
        let graph = s.execs.remove(&exec);
        s.auto_free.remove(&exec);
        s.drop_graph(graph)
    }

    fn cuGraphDestroy(graph: Handle) |s| {
        let graph = s.graphs.remove(&graph);
        s.drop_graph(graph)
    }
}

/// A cooperative launch needs room for all its blocks at once.
fn cooperative(
    s: &mut State,
    function: Handle,
    grid: [u32; 3],
    block: [u32; 3],
    shared: u32,
) -> Call {
    let threads: u32 = block.iter().product();
    let each = s.blocks_per_processor(function, threads as i32, shared as usize)?;
    let room = s.config()?.processors() as u64 * each as u64;
    if grid.iter().map(|&n| u64::from(n)).product::<u64>() > room {
        return Err(720);
    }
    Ok(())
}

fn potential(
    s: &mut State,
    grid: Out<i32>,
    block: Out<i32>,
    function: Handle,
    shared_of: Option<extern "C" fn(i32) -> usize>,
    shared: usize,
    limit: i32,
) -> Call {
    let limit = if limit <= 0 { 1024 } else { limit.min(1024) };
    let mut best = (0, 0, 0);
    for threads in (32..=limit).step_by(32) {
        let shared = shared_of.map_or(shared, |f| f(threads));
        let blocks = s.blocks_per_processor(function, threads, shared)?;
        if blocks * threads >= best.0 {
            best = (blocks * threads, threads, blocks);
        }
    }
    let processors = s.config()?.processors() as i32;
    grid.set(best.2 * processors)?;
    block.set(best.1)
}

/// `cuGetErrorName` of the CUDA driver API.
#[unsafe(no_mangle)]
#[allow(non_snake_case, reason = "the API is given")]
pub extern "C" fn cuGetErrorName(code: Code, text: Out<*const c_char>) -> Code {
    describe(code, text, false)
}

/// `cuGetErrorString` of the CUDA driver API.
#[unsafe(no_mangle)]
#[allow(non_snake_case, reason = "the API is given")]
pub extern "C" fn cuGetErrorString(code: Code, text: Out<*const c_char>) -> Code {
    describe(code, text, true)
}

fn describe(code: Code, text: Out<*const c_char>, long: bool) -> Code {
    let (found, result) = match errors::lookup(code) {
        Some((name, description)) => (if long { description } else { name }.as_ptr(), 0),
        None => (std::ptr::null(), 1),
    };
    text.set(found).map_or_else(|code| code, |()| result)
}
