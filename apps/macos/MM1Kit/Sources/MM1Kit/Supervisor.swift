#if os(macOS) || os(Linux)
    import Foundation

    /// Keeps one `mm1 serve` running.
    struct Supervisor: Sendable {
        let command: MM1Server.Command
        let options: MM1Server.Options
        let board: Board
        /// 256 bits of the system's generator, which is made for keys.
        private let key = Data((0..<32).map { _ in UInt8.random(in: .min ... .max) })
            .base64EncodedString()

        /// How a server ended, and where it had served, nil if it never did.
        private struct Death {
            let error: MM1ServerError
            let port: UInt16?
        }

        init(_ command: MM1Server.Command, _ options: MM1Server.Options, _ board: Board) {
            self.command = command
            self.options = options
            self.board = board
        }

        /// Ends once its task is cancelled, or the server is given up.
        func run() async {
            var deaths = 0
            // Which clients know; one that never served is set up wrongly, and stays so.
            var known: UInt16?
            while !Task.isCancelled {
                board.post(.starting)
                let began = ContinuousClock.now
                let death = await serve(known)
                if Task.isCancelled { break }
                known = death.port ?? known
                if ContinuousClock.now - began >= options.backoff.recovery { deaths = 0 }
                deaths += 1
                guard known != nil, let delay = options.backoff.delay(after: deaths) else {
                    board.post(.failed(death.error))
                    return
                }
                let reason = death.error.localizedDescription
                options.log("\(reason); it is started again in \(delay)")
                board.post(.restarting(after: delay, because: death.error))
                try? await Task.sleep(for: delay)
            }
            board.post(.stopped)
        }

        /// Serves until the server ends.
        private func serve(_ known: UInt16?) async -> Death {
            let (wanted, others) =
                switch options.port {
                case .any: (known ?? 0, known != nil)
                case .exactly(let port): (port, false)
                case .preferring(let port): (known ?? port, true)
                }
            let death = await serve(at: wanted)
            guard others, case .portTaken = death.error, !Task.isCancelled else { return death }
            options.log("\(death.error.localizedDescription); one that is free is taken")
            return await serve(at: 0)
        }

        private func serve(at port: UInt16) async -> Death {
            let child: Child
            do {
                child = try Child(
                    command, arguments: arguments(port), environment: environment,
                    log: options.log)
            } catch {
                return Death(error: error, port: nil)
            }
            let grace = options.grace
            return await withTaskCancellationHandler {
                await watch(child, port)
            } onCancel: {
                child.terminate()
                Task {
                    try await Task.sleep(for: grace)
                    child.kill()
                }
            }
        }

        private func watch(_ child: Child, _ port: UInt16) async -> Death {
            let late = Task {
                do { try await Task.sleep(for: options.startTimeout) } catch { return false }
                child.kill()
                return true
            }
            guard let served = await child.served.value else {
                let exit = await child.exit.value
                late.cancel()
                if await late.value {
                    return Death(error: .notReady(options.startTimeout), port: nil)
                }
                let message = await child.lastWords()
                // As apps/server/run.py says it; a test holds the two together.
                let isTaken = message.contains("cannot be listened at")
                let error: MM1ServerError =
                    isTaken ? .portTaken(port) : .exited(exit, message: message)
                return Death(error: error, port: nil)
            }
            late.cancel()
            let silence = Task { await keepWatch(child, served) }
            let exit = await child.exit.value
            silence.cancel()
            let error: MM1ServerError =
                await silence.value
                ? .unresponsive : .exited(exit, message: await child.lastWords())
            return Death(error: error, port: served.url.port.flatMap(UInt16.init))
        }

        /// Asks the server whether it is well, and kills it if it is not.
        ///
        /// - Returns: whether it did; false if it was cancelled.
        private func keepWatch(_ child: Child, _ served: Child.Served) async -> Bool {
            let seconds = options.pulse / .seconds(1)
            let asking = MM1Client(url: served.url, timeout: seconds)
            var (silences, isKnown) = (0, false)
            while silences < 3 {
                let next = ContinuousClock.now + options.pulse
                let health = try? await asking.health()
                if Task.isCancelled { return false }
                if health?.status == .failed { break }
                silences = health == nil ? silences + 1 : 0
                if health != nil && !isKnown {
                    isKnown = true
                    board.post(.running(running(child, served)))
                }
                do { try await Task.sleep(until: next, clock: .continuous) } catch { return false }
            }
            child.kill()
            return true
        }

        private func running(_ child: Child, _ served: Child.Served) -> MM1Server.Running {
            MM1Server.Running(
                client: MM1Client(url: served.url, key: key), model: served.model,
                version: served.version, pid: child.pid)
        }

        private func arguments(_ port: UInt16) -> [String] {
            ["serve", "--host", "127.0.0.1", "--port", String(port)]
                + ["--json", "--exit-with-stdin"]
                + (options.model.map { ["--model", $0] } ?? []) + options.arguments
        }

        private var environment: [String: String] {
            var environment = options.inherited
            // Not an argument, which all users of the machine can read.
            environment["MM1_API_KEY"] = key
            // An app's signature covers what lies in it: nothing may be added.
            if command.isInside(.main) { environment["PYTHONDONTWRITEBYTECODE"] = "1" }
            return environment
        }
    }
#endif
