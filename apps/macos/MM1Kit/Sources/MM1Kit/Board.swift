#if os(macOS) || os(Linux)
    import Foundation

    /// A server's state, for all who want to know it.
    final class Board: @unchecked Sendable {
        private let lock = NSLock()
        private var current = MM1Server.State.stopped
        private var readers: [UUID: AsyncStream<MM1Server.State>.Continuation] = [:]

        var state: MM1Server.State {
            lock.withLock { current }
        }

        func post(_ state: MM1Server.State) {
            lock.withLock {
                current = state
                for reader in readers.values { reader.yield(state) }
            }
        }

        /// The present state and all later ones.
        func states() -> AsyncStream<MM1Server.State> {
            let (states, reader) = AsyncStream.makeStream(of: MM1Server.State.self)
            let id = UUID()
            reader.onTermination = { [weak self] _ in
                self?.lock.withLock { self?.readers[id] = nil }
            }
            lock.withLock {
                reader.yield(current)
                readers[id] = reader
            }
            return states
        }

        deinit {
            for reader in readers.values { reader.finish() }
        }
    }
#endif
