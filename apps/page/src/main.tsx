/** Begins the page. */

import { render } from "preact";
import { start } from "./chats";
import { findModel } from "./models";
import { App } from "./view/app";

const page = document.getElementById("page");
if (!page) throw new Error("index.html has no #page");
// The address names a chat: it is read before anything is shown in its place.
await start();
render(<App />, page);
void findModel();
